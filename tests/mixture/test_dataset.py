"""A mixture as a dataset: shares at every moment, states that go on at the next row, and ends."""

from __future__ import annotations

import itertools
import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from hf_objectives.errors import ConfigError
from hf_objectives.mixture.build import build_mixture
from tests.support.mixtures import KINDS, LENGTHS, due_on_the_line, mixture, name_of, of_kind, source, sources, taken

# -- shares -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("unit", ["tokens", "examples", "rows"])
def test_every_source_has_its_share_at_every_moment(unit, streams):
    shares, longest = np.array([0.6, 0.3, 0.1]), 1
    given_so_far = np.zeros(3)
    for row in itertools.islice(mixture({"unit": unit}, streams=streams), 3_000):
        amount = len(row["input_ids"]) if unit == "tokens" else 1
        longest = max(longest, amount)
        given_so_far["abc".index(row["source"])] += amount
        assert np.abs(given_so_far - shares * given_so_far.sum()).max() <= longest + 1e-6


def test_rows_are_the_sources_with_a_name():
    original = {name: source(name) for name in "abc"}
    for row in itertools.islice(mixture(), 200):
        wanted = original[row["source"]][row["n"]]
        assert row["input_ids"].tolist() == wanted["input_ids"] and set(row) == {"input_ids", "n", "source"}


# -- states ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_state_goes_on_at_the_very_next_row(kind):
    expected = taken(of_kind(kind), 700)
    made = of_kind(kind)
    taken(made, 650)  # a stream's place is known by reading
    for row in (0, 129, 130, 600):
        resumed = of_kind(kind)
        resumed.load_state_dict(json.loads(json.dumps(made.state_dict(row))))
        assert taken(resumed, 50) == expected[row : row + 50]
        # And the one that was resumed has a state as well.
        again = of_kind(kind)
        again.load_state_dict(json.loads(json.dumps(resumed.state_dict(row + 40))))
        assert taken(again, 10) == expected[row + 40 : row + 50]
        assert again.report(row + 40).to_dict() == made.report(row + 40).to_dict()


@pytest.mark.slow
@settings(deadline=None, max_examples=10)
@given(stops=st.lists(st.integers(0, 300), min_size=1, max_size=4), data=st.data())
def test_however_often_it_is_resumed_nothing_is_lost_or_repeated(stops, data):
    kind = data.draw(st.sampled_from(list(KINDS)))
    seen, state = [], None
    for stop in stops:
        made = of_kind(kind)
        if state is not None:
            made.load_state_dict(state)
        seen += taken(made, stop)
        state = json.loads(json.dumps(made.state_dict(len(seen))))
    assert seen == taken(of_kind(kind), len(seen))


@pytest.mark.slow
def test_a_state_does_not_grow():
    ten = {f"source {i}": {"dataset": source("a"), "weight": i + 1} for i in range(10)}
    made = build_mixture({"sources": ten})
    sizes = [len(json.dumps(made.state_dict(row))) for row in (1, 1_000, 100_000)]
    assert max(sizes) < 5_000 and sizes[2] - sizes[0] < 500


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"sources": sources((0.5, 0.4, 0.1))}, "weight of 'a': 0.6 there, 0.5 here; weight of 'b': 0.3"),
        ({"sources": {**sources(), "a": {"dataset": source("b"), "weight": 0.6}}}, r"sources of 'a': \[40, "),
        ({"unit": "examples"}, "unit: tokens there, examples here"),
        ({"packing": "across", "max_length": 64}, "packing: None there, "),
        ({"stages": [{"begin": 10, "weights": {"a": 1}}]}, "stages: "),
        ({"sources": {**sources(), "d": {"dataset": source("b"), "weight": 0}}}, "sources of 'd': missing there"),
        ({"sources": dict(reversed(sources().items()))}, "names: .'a', 'b', 'c'. there, .'c', 'b', 'a'. here"),
    ],
)
def test_a_state_of_another_mixture_is_refused(other, words):
    with pytest.raises(ConfigError, match="the state is of another mixture: .*" + words):
        mixture(other).load_state_dict(mixture().state_dict(5))


def test_what_is_no_state_of_a_mixture_is_refused():
    with pytest.raises(ConfigError, match="not one of a mixture; it was made on other data"):
        mixture().load_state_dict({"row": 5})
    with pytest.raises(ConfigError, match="not one of a mixture; it was made on other data"):
        mixture().load_state_dict({"row": 5, "mixture": mixture().state_dict(0)["mixture"]})
    with pytest.raises(ConfigError, match="seed: 0 there, 1 here"):
        mixture(seed=1).load_state_dict(mixture().state_dict(5))
    with pytest.raises(ConfigError, match="row 9 of a mixture with streams was not read here"):
        mixture(streams=True).state_dict(9)


# -- what happens ------------------------------------------------------------------------------------------------


def test_at_names_what_a_row_is(monkeypatch):
    monkeypatch.setattr("hf_objectives.mixture.dataset._KEPT_EVERY", 1)
    made = mixture()
    rows = taken(made, 900)
    for n in (899, 0, 1, 450, 898, 99, 100, 101):
        draw = made.at(n)
        assert (draw.source, draw.row) == rows[n]
    assert [made.at(n).epoch for n in range(900) if rows[n] == ("c", 3)] == list(
        range(sum(row == ("c", 3) for row in rows))
    )
    with pytest.raises(ConfigError, match="source 'a' is a stream, whose rows cannot be looked up"):
        mixture(streams=True).at(0)


# -- ends, stages and blocklists ---------------------------------------------------------------------------------


@pytest.mark.parametrize("streams", [False, True])
def test_a_source_that_ends_leaves_its_share_to_the_others(streams):
    made = mixture({"unit": "examples"}, streams=streams, max_epochs={"a": 2})
    rows = taken(made, 800)
    names = [name for name, _ in rows]
    assert names.count("a") == 80 and Counter(row for row in rows if row[0] == "a") == {("a", n): 2 for n in range(40)}
    last = len(names) - names[::-1].index("a")
    after = Counter(names[last + 3 :])
    assert after["b"] / after.total() == pytest.approx(0.75, abs=0.01)  # 0.3 of 0.4
    for row in range(last - 30, last + 30):  # asked is what the weights up to here ask for, wherever blocks begin
        assert all(abs(one.asked - one.share) * row <= 2 for one in made.report(row))


@pytest.mark.parametrize("streams", [False, True])
def test_where_all_sources_end_the_mixture_ends(streams, caplog):
    made = mixture({"unit": "examples"}, streams=streams, max_epochs={"a": 1, "b": 2, "c": 3})
    rows = taken(made, 10_000)
    assert Counter(rows) == {
        (name, n): k for name, k in (("a", 1), ("b", 2), ("c", 3)) for n in range(LENGTHS[name][0])
    }
    made.batch_rows = 4  # 111 rows
    assert taken(made, 10_000) == rows[:108] and "the mixture ends: 3 rows that do not fill 4" in caplog.text
    resumed = mixture({"unit": "examples"}, streams=streams, max_epochs={"a": 1, "b": 2, "c": 3})
    resumed.load_state_dict(json.loads(json.dumps(made.state_dict(108))))
    assert taken(resumed, 50) == rows[108:]


def test_a_run_that_asks_for_more_than_there_is_is_refused_before_it_begins():
    made = mixture({"unit": "examples"}, max_epochs={"a": 1, "b": 2, "c": 3})
    made.expect(111)
    with pytest.raises(
        ConfigError, match=r"max_epochs after 111 rows, and the run takes 112; raise max_epochs \(a 1, b 2"
    ):
        made.expect(112)
    stream = mixture({"unit": "examples"}, streams=True, max_epochs={"a": 1, "b": 2, "c": 3})
    stream.expect(112)
    with pytest.raises(ConfigError, match="every source with a weight reaches its max_epochs after 111 rows"):
        taken(stream, 112)
    with pytest.raises(ConfigError, match="the mixture has 111 draws"):
        made.at(111)


def test_a_stage_in_which_nothing_is_left_is_an_end():
    stages = [{"begin": 500, "weights": {"b": 1}}]
    made = mixture({"unit": "examples", "sources": sources((1, 0, 0), max_epochs={"a": 2}), "stages": stages})
    made.expect(80)
    with pytest.raises(ConfigError, match="every source with a weight reaches its max_epochs after 80 rows"):
        made.expect(81)
    assert len(taken(mixture({"unit": "examples", "sources": sources((1, 0, 0), max_epochs={"a": 2})}), 500)) == 80


def test_a_source_that_will_be_repeated_often_is_told():
    made = mixture()
    epochs = made.expected_epochs(1_000)
    assert epochs == pytest.approx({one.name: one.epochs for one in made.report(1_000)}, rel=0.1)
    assert f"source 'c' will be repeated {epochs['c']:.1f} times in 1,000 rows" in " ".join(made.expect(1_000))
    capped = mixture(max_epochs={"a": 2, "c": 4})
    assert capped.expected_epochs(1_000) == pytest.approx(
        {one.name: one.epochs for one in capped.report(1_000)}, rel=0.1
    )
    assert mixture().expect(20) == []


def test_stages_change_the_shares():
    stages = [{"begin": 5_000, "weights": {"b": 1}}, {"begin": 10_000, "end": 20_000, "weights": {"a": 1, "c": 1}}]
    made = mixture({"stages": stages})
    tokens, at = np.zeros(3), 0
    seen = {}
    for n, row in enumerate(made):
        tokens["abc".index(row["source"])] += len(row["input_ids"])
        at += len(row["input_ids"])
        for stop in (5_000, 10_000, 20_000, 24_000):
            if at >= stop and stop not in seen:
                seen[stop] = tokens.copy()
                due = due_on_the_line(made.plan, at)
                assert np.abs(tokens - due).max() <= 95
                report = made.report(n + 1)
                assert [one.asked for one in report] == pytest.approx((due / due.sum()).tolist(), abs=1e-3)
        if at > 24_000:
            break
    assert seen[10_000] - seen[5_000] == pytest.approx([0, 5_000, 0], abs=190)
    assert seen[20_000] - seen[10_000] == pytest.approx([2_500, 5_000, 2_500], abs=190)
    resumed = mixture({"stages": stages})
    resumed.load_state_dict(json.loads(json.dumps(made.state_dict(300))))
    assert taken(resumed, 200) == taken(made, 500)[300:]


def test_a_mixture_is_a_torch_dataset():
    loader = DataLoader(mixture(), batch_size=4, collate_fn=list)
    assert [name_of(row) for row in next(iter(loader))] == taken(mixture(), 4)
