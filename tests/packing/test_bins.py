"""Bins, against best-fit decreasing and first fit one document at a time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_objectives.errors import ConfigError
from hf_objectives.packing.bins import pack_lengths


def one_at_a_time(lengths: list[int], capacity: int) -> list[int]:
    """Best-fit decreasing as in a textbook: the remaining room of each bin, sorted."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        best = min(fitting) if fitting else capacity
        if fitting:
            rooms.remove(best)
        rooms.append(best - length)
    return sorted(rooms)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 40).flatmap(lambda c: st.tuples(st.just(c), st.lists(st.integers(1, c), max_size=60))))
def test_best_fit_is_the_textbooks(case):
    capacity, lengths = case
    packing = pack_lengths(lengths, capacity)
    used = np.bincount(packing.bin_of, lengths, packing.num_bins)
    assert sorted((capacity - used).astype(int).tolist()) == one_at_a_time(lengths, capacity)
    assert packing.fill == pytest.approx(sum(lengths) / (packing.num_bins * capacity) if lengths else 1.0)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 40).flatmap(lambda c: st.tuples(st.just(c), st.lists(st.integers(0, c), max_size=60))))
def test_first_fit_is_the_textbooks(case):
    capacity, lengths = case
    rooms: list[int] = []
    expected = []
    for length in lengths:
        place = next((i for i, room in enumerate(rooms) if room >= length), len(rooms))
        rooms += [capacity] * (place == len(rooms))
        rooms[place] -= length
        expected.append(place)
    packing = pack_lengths(lengths, capacity, strategy="first_fit")
    assert packing.bin_of.tolist() == expected and packing.num_bins == len(rooms)


def test_concat_counts_a_document_to_the_bin_that_it_begins_in():
    packing = pack_lengths([3, 4, 12, 1, 0], 5, strategy="concat")
    assert packing.bin_of.tolist() == [0, 0, 1, 3, 3] and packing.num_bins == 4 and packing.fill == 1.0
    assert pack_lengths([], 5, strategy="concat").num_bins == 0


def test_a_million_documents_fill_their_rows():
    lengths = np.clip(np.random.default_rng(0).lognormal(5.5, 1.0, 1_000_000).astype(int), 1, 2048)
    packing = pack_lengths(lengths, 2048)
    used = np.bincount(packing.bin_of, lengths, packing.num_bins)
    assert used.max() <= 2048 and packing.fill > 0.99


@pytest.mark.parametrize(
    ("lengths", "capacity", "options", "words"),
    [
        ([3, 9], 5, {}, "document 1 has 9 tokens, a bin holds 5"),
        ([3], 5, {"strategy": "bestfit"}, "did you mean 'best_fit'"),
        ([3], 0, {}, "capacity is 0"),
        ([-1], 5, {}, "document 0 has length -1"),
    ],
)
def test_bad_arguments_are_named(lengths, capacity, options, words):
    with pytest.raises(ConfigError, match=words):
        pack_lengths(lengths, capacity, **options)
