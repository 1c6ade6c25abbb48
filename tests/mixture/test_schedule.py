"""The order of draws: every source within one draw of its share at every moment, for draws of any size."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_objectives.errors import ConfigError
from hf_objectives.mixture.schedule import Schedule, mixture_schedule

WEIGHTS = st.lists(st.floats(0, 1) | st.sampled_from([0.0, 1e-6, 1.0]), min_size=1, max_size=12).filter(
    lambda weights: sum(weights) > 0
)


def worst(order: np.ndarray, weights: np.ndarray) -> float:
    """The largest distance of a source from its share, over all sources and all prefixes."""
    counts = np.cumsum(order[:, None] == np.arange(len(weights)), axis=0)
    return float(np.abs(counts - np.arange(1, len(order) + 1)[:, None] * weights).max())


def test_by_hand():
    # Begins 0, 2, 4 ... and 0, 4, 8 ... in draws; due 2, 4, 6 ... and 4, 8 ...; ties go to the source named first.
    assert mixture_schedule([2, 1, 1], 8).tolist() == [0, 1, 0, 2, 0, 1, 0, 2]
    assert mixture_schedule([0, 1], 3).tolist() == [1, 1, 1]
    assert mixture_schedule([1e308, 1e308], 4).tolist() == [0, 1, 0, 1]
    assert mixture_schedule([3], 2).tolist() == [0, 0] and mixture_schedule([1, 2], 0).tolist() == []


@settings(deadline=None)
@given(weights=WEIGHTS, n=st.integers(0, 3000))
def test_within_one_draw_of_every_share_at_every_moment(weights, n):
    order, shares = mixture_schedule(weights, n), np.array(weights) / np.sum(weights)
    assert len(order) == n and (n == 0 or worst(order, shares) <= 1 + 1e-9)
    assert not np.isin(order, np.flatnonzero(shares == 0)).any()


@pytest.mark.slow
@pytest.mark.parametrize(
    "weights", [np.random.default_rng(0).random(2_000) ** 4, [1 - 2e-6, 1e-6, 1e-6], [0.82, 0.045, 0.045, 0.045, 0.045]]
)
def test_thousands_of_sources_and_tiny_weights(weights):
    order, shares = mixture_schedule(weights, 150_000), np.array(weights) / np.sum(weights)
    at = np.arange(1, len(order) + 1)
    for source in np.argsort(shares)[[0, len(shares) // 2, -1]]:
        assert np.abs(np.cumsum(order == source) - shares[source] * at).max() <= 1 + 1e-6


@given(weights=WEIGHTS, n=st.integers(0, 300), more=st.integers(0, 300))
def test_a_shorter_schedule_is_the_beginning_of_a_longer_one(weights, n, more):
    assert mixture_schedule(weights, n + more)[:n].tolist() == mixture_schedule(weights, n).tolist()


def test_blocks_have_no_seams(monkeypatch):
    whole = mixture_schedule([5, 3, 1.7, 0.01], 2_000)
    monkeypatch.setattr("hf_objectives.mixture.schedule._BLOCK", 37)
    assert mixture_schedule([5, 3, 1.7, 0.01], 2_000).tolist() == whole.tolist()


SIZES = st.lists(st.lists(st.integers(1, 400), min_size=30, max_size=30), min_size=1, max_size=5)


def drawn(schedule: Schedule, sizes: list[list[int]], known: int) -> list[int]:
    """Sources in order, with `known` sizes of each at a time, until one has no further draw."""
    at, order = [0] * len(sizes), []
    while all(a < len(of) for a, of in zip(at, sizes, strict=True)):
        some = schedule.draw([of[a : a + known] for a, of in zip(at, sizes, strict=True)])
        assert len(some)  # a known draw of each source always decides one
        for source in some:
            at[source] += 1
        order += some.tolist()
    return order


@pytest.mark.slow
@settings(deadline=None)
@given(sizes=SIZES, data=st.data())
def test_documents_of_any_length_stay_within_the_longest_of_their_share(sizes, data):
    weights = np.array(data.draw(st.lists(st.floats(0.01, 1), min_size=len(sizes), max_size=len(sizes))))
    order = drawn(Schedule(weights), sizes, 30)
    shares, longest = weights / weights.sum(), max(map(max, sizes))
    at, had, total = [0] * len(sizes), np.zeros(len(sizes)), 0
    for source in order:
        size = sizes[source][at[source]]
        at[source] += 1
        had[source] += size
        total += size
        assert np.abs(had - shares * total).max() <= longest + 1e-6
        # Nobody is ahead by more than a document of its own.
        assert (had - shares * total)[source] <= max(sizes[source]) + 1e-6
    # What is known of the sizes at a time changes nothing.
    again = drawn(Schedule(weights), sizes, data.draw(st.integers(1, 7)))
    assert again[: len(order)] == order[: len(again)]


@settings(deadline=None, max_examples=40)
@given(sizes=SIZES, data=st.data())
def test_a_state_goes_on_where_it_was_taken(sizes, data):
    weights = list(range(1, len(sizes) + 1))
    whole = drawn(Schedule(weights), sizes, 4)
    first, stop = Schedule(weights), data.draw(st.integers(0, len(whole)))
    at, order = [0] * len(sizes), []
    while len(order) < stop:
        known = [of[a : a + 4] for a, of in zip(at, sizes, strict=True)]
        for source in first.draw(known, stop - len(order)):
            at[source] += 1
            order.append(int(source))
    second = Schedule(weights)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    rest = drawn(second, [of[a:] for a, of in zip(at, sizes, strict=True)], 4)
    assert (order + rest)[: len(whole)] == whole[: len(order) + len(rest)] and len(order) == stop


def test_other_weights_hold_from_where_they_begin():
    schedule = Schedule([1, 1], [(1_001, [9, 1])])
    ones = [np.ones(3_000, np.int64)] * 2
    order = schedule.draw(ones, 2_001)
    at = np.arange(1, 2_002)[:, None]
    due = np.minimum(at, 1_001) * np.array([0.5, 0.5]) + np.maximum(at - 1_001, 0) * np.array([0.9, 0.1])
    assert np.abs(np.cumsum(order[:, None] == np.arange(2), axis=0) - due).max() <= 1 + 1e-9
    assert np.allclose(schedule.due, due[-1]) and schedule.weights.tolist() == [0.9, 0.1]


def test_a_source_that_comes_later_is_not_waited_for():
    schedule = Schedule([1, 0], [(10, [1, 1])])
    assert schedule.draw([[1] * 50, []]).tolist() == [0] * 10 and schedule.waits_for == 1
    assert sorted(schedule.draw([[1] * 50, [1] * 50], 2).tolist()) == [0, 1]


def test_a_retired_sources_share_goes_to_the_others_in_proportion():
    schedule = Schedule([6, 3, 1], [(2_000, [1, 1, 2])])
    ones = [np.ones(3_000, np.int64)] * 3
    assert schedule.draw([ones[0][:60], *ones[1:]]).tolist().count(0) == 60 and schedule.waits_for == 0
    before = schedule.drawn.copy()
    schedule.retire(0)
    assert schedule.due.sum() == pytest.approx(schedule.units) and schedule.due[0] == 60
    assert schedule.weights.tolist() == [0, 0.75, 0.25]
    schedule.draw([[], *ones[1:]], 1_000)
    gained = schedule.drawn - before
    assert gained[0] == 0 and np.abs(gained - [0, 750, 250]).max() <= 2
    schedule.draw([[], *ones[1:]], 2_000 - schedule.units)
    at = schedule.drawn.copy()
    schedule.draw([[], *ones[1:]], 300)
    assert np.abs(schedule.drawn - at - [0, 100, 200]).max() <= 2
    schedule.retire(1)
    schedule.retire(2)
    assert not schedule.weights.any()


@pytest.mark.slow
@settings(deadline=None, max_examples=25)
@given(weights=st.lists(st.floats(0.01, 1), min_size=2, max_size=6), draws=st.integers(0, 200), data=st.data())
def test_whenever_a_source_retires_all_that_was_drawn_stays_due(weights, draws, data):
    schedule = Schedule(weights)
    ones = [np.ones(400, np.int64)] * len(weights)
    schedule.draw(ones, draws)
    gone = data.draw(st.integers(0, len(weights) - 1))
    schedule.retire(gone)
    assert schedule.due.sum() == pytest.approx(schedule.units) and schedule.due[gone] == schedule.drawn[gone]
    for _ in range(100):
        schedule.draw([[] if i == gone else ones[i] for i in range(len(weights))], 1)
        # What it left over moves the others by less than another draw.
        assert np.abs(schedule.drawn - schedule.due).max() <= 2


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ([1, -0.1], "weight 1 is -0.1; expected a number, 0 or more"),
        ([float("nan"), 1], "weight 0 is nan"),
        ([1, float("inf")], "weight 1 is inf"),
        ([0, 0], "2 weights, none above 0"),
        ([], "0 weights, none above 0"),
    ],
)
def test_weights_that_mean_nothing_are_named(weights, words):
    with pytest.raises(ConfigError, match=words):
        mixture_schedule(weights, 5)


def test_another_number_of_sources_is_named():
    with pytest.raises(ConfigError, match="3 weights for 2 sources"):
        Schedule([1, 1], [(5, [1, 1, 1])])
    with pytest.raises(ConfigError, match="of a schedule of 1 sources, this one has 2"):
        Schedule([1, 1]).load_state_dict(Schedule([1]).state_dict())
