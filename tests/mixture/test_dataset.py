"""A mixture as a dataset: shares, passes, one order for all who read, and states that go on at the next row."""

from __future__ import annotations

import itertools
import json
import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from accelerate.state import PartialState
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from hf_objectives.errors import ConfigError
from hf_objectives.mixture.build import build_mixture
from hf_objectives.mixture.feeds import MappedFeed
from tests.support.mixtures import LENGTHS, mixture, name_of, source, sources, taken

KINDS = {
    "tokens": {},
    "examples": {"unit": "examples"},
    "within": {"packing": "within", "max_length": 64},
    "across": {"packing": "across", "max_length": 64},
    "concat": {"packing": "across", "max_length": 64, "strategy": "concat"},
    "streams": {},
    "streams within": {"packing": "within", "max_length": 64},
    "streams across": {"packing": "across", "max_length": 64},
}


def of_kind(kind: str, seed: int = 0, **more):
    return mixture(KINDS[kind], streams=kind.startswith("streams"), seed=seed, **more)


@pytest.fixture(params=list(KINDS))
def kind(request):
    return request.param


# -- shares and passes -------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("streams", [False, True])
def test_every_pass_of_a_source_is_a_new_order_of_all_its_rows(streams):
    rows = taken(mixture({"unit": "examples"}, streams=streams), 1_500)
    for name, (size, *_) in LENGTHS.items():
        mine = [number for source, number in rows if source == name]
        passes = [mine[i : i + size] for i in range(0, len(mine) - size + 1, size)]
        assert len(passes) > 5 and all(sorted(one) == list(range(size)) for one in passes)
        assert len({tuple(one) for one in passes}) == len(passes)


def test_rows_are_the_sources_with_a_name():
    original = {name: source(name) for name in "abc"}
    for row in itertools.islice(mixture(), 200):
        wanted = original[row["source"]][row["n"]]
        assert row["input_ids"].tolist() == wanted["input_ids"] and set(row) == {"input_ids", "n", "source"}


def test_seeds_and_other_sources_change_orders():
    base = taken(mixture(), 300)
    assert taken(mixture(), 300) == base and taken(mixture(seed=1), 300) != base
    # A source's own order does not depend on its companions.
    alone = build_mixture({"sources": {"b": source("b")}}, seed=0)
    mine = [row for row in base if row[0] == "b"]
    assert taken(alone, len(mine)) == mine


def test_packed_rows_hold_every_document_whole(kind):
    if "within" not in kind and "across" not in kind:
        return
    documents = Counter()
    made = of_kind(kind)
    rows = 400
    if "across" in kind:  # documents that are packed together
        order = made._order()
        rows = sum(order.block().num_rows for _ in range(2))
    for row in itertools.islice(made, rows):
        assert sum(row["seq_lengths"]) == len(row["input_ids"]) == len(row["labels"]) <= 64
        begin = 0
        for name, number, length in name_of(row):
            piece = row["input_ids"][begin : begin + length]
            assert (piece == 1_000 * ord(name) + number).all()
            assert row["labels"][begin] == -100 and (row["labels"][begin + 1 : begin + length] == piece[1:]).all()
            documents[name, number] += length
            begin += length
    if "across" not in kind:
        assert all(len(set(row["sources"])) == 1 for row in itertools.islice(made, 100))
    # As many tokens of each as of the others, to within a pass.
    for name, (size, *_) in LENGTHS.items():
        lengths = {number: len(row["input_ids"]) for number, row in enumerate(source(name))}
        seen = [documents[name, number] / lengths[number] for number in range(size)]
        assert max(seen) - min(seen) <= 2 and min(seen) > 0


def test_rows_packed_across_sources_are_full():
    rows = list(itertools.islice(mixture({"packing": "across", "max_length": 256}), 250))
    assert np.mean([len(row["input_ids"]) for row in rows]) > 0.97 * 256
    tokens = Counter()
    for row in rows:
        for name, _, length in name_of(row):
            tokens[name] += length
        # Nor does a source with short documents, which fill gaps, come first.
        assert all(abs(tokens[n] - w * tokens.total()) <= 2 * 256 for n, w in zip("abc", (0.6, 0.3, 0.1), strict=True))


# -- one order for all -------------------------------------------------------------------------------------------


def steps_of(made, ranks: int, workers: int, steps: int, size: int = 2) -> list[tuple]:
    """The rows of some steps, the parts of all ranks end to end, as their Trainers would get them."""
    PartialState(cpu=True)
    made.batch_rows = size * ranks
    parts = []
    for rank in range(ranks):
        loader = DataLoader(made, batch_size=size, num_workers=workers, collate_fn=list)
        prepared = prepare_data_loader(
            loader, torch.device("cpu"), ranks, rank, put_on_device=False, dispatch_batches=False, rng_types=[]
        )
        parts.append(list(itertools.islice(prepared, steps)))
    return [name_of(row) for step in zip(*parts, strict=True) for part in step for row in part]


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("workers", [0, 2, 3])
@pytest.mark.parametrize("some", ["tokens", "across", "streams"])
def test_any_ranks_and_workers_read_the_same_rows_once_and_go_on_under_others(some, ranks, workers):
    expected = taken(of_kind(some), 48)
    made = of_kind(some)
    assert steps_of(made, ranks, workers, 24 // (2 * ranks)) == expected[:24]
    state = json.loads(json.dumps(made.state_dict(24)))
    for other_ranks, other_workers in ((4 // ranks, (workers + 2) % 5), (2, 0)):
        resumed = of_kind(some)
        resumed.load_state_dict(state)
        assert steps_of(resumed, other_ranks, other_workers, 24 // (2 * other_ranks)) == expected[24:]


# -- states ------------------------------------------------------------------------------------------------------


def test_a_state_goes_on_at_the_very_next_row(kind):
    expected = taken(of_kind(kind), 700)
    made = of_kind(kind)
    taken(made, 650)  # a stream's place is known by reading
    for row in (0, 1, 129, 130, 257, 499, 600):
        resumed = of_kind(kind)
        resumed.load_state_dict(json.loads(json.dumps(made.state_dict(row))))
        assert taken(resumed, 50) == expected[row : row + 50]
        # And the one that was resumed has a state as well.
        again = of_kind(kind)
        again.load_state_dict(json.loads(json.dumps(resumed.state_dict(row + 40))))
        assert taken(again, 10) == expected[row + 40 : row + 50]
        assert again.report(row + 40).to_dict() == made.report(row + 40).to_dict()


@settings(deadline=None, max_examples=15)
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


def pieces_of(row) -> tuple[list, list]:
    """Source and length of each piece."""
    if "sources" in row:
        return row["sources"], row["seq_lengths"]
    return [row["source"]], [len(row["input_ids"])]


def test_the_report_is_what_was_counted(kind):
    made = of_kind(kind)
    tokens, examples = Counter(), Counter()
    for n, row in enumerate(itertools.islice(made, 500)):
        if n in (0, 1, 63, 256, 400):
            report = made.report(n)
            assert {one.name: one.tokens for one in report} == {name: tokens[name] for name in "abc"}
            if kind != "concat":  # documents of b are cut in two, and count once where they are drawn
                names = "ac" if "across" in kind else "abc"
                assert [report[name].examples for name in names] == [examples[name] for name in names]
            assert sum(one.asked for one in report) == pytest.approx(1) and report.row == n
        for name, length in zip(*pieces_of(row), strict=True):
            tokens[name] += length
            examples[name] += 1
    if kind == "tokens":
        assert [one.epochs for one in made.report(500)] == pytest.approx(
            [sum(1 for r in taken(made, 500) if r[0] == name) / LENGTHS[name][0] for name in "abc"]
        )
        assert "after 500 rows, shares of tokens" in str(made.report(500)) and "60.0" in str(made.report(500))
        assert made.report(500)["a"].share == pytest.approx(0.6, abs=0.01)
        assert made.report(500).metrics()["mixture/a/tokens"] == made.report(500)["a"].tokens


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


def test_a_stream_without_a_weight_is_never_waited_for():
    def rows():
        yield {"input_ids": [1], "n": 0}
        raise AssertionError("waited for")

    late = type("Late", (), {"__iter__": lambda self: rows()})()
    made = mixture({"sources": {**sources(), "d": {"dataset": late, "weight": 0}}})
    assert taken(made, 300) == taken(mixture(), 300)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_source_of_few_rows_is_looked_ahead_for_many_passes(size, monkeypatch):
    asked = []
    whole = MappedFeed.ahead
    monkeypatch.setattr(MappedFeed, "ahead", lambda self, *given: asked.append(1) or whole(self, *given))
    few = {"a": source("a"), "z": source("c").select(range(size))}
    weighed = {name: {"dataset": rows, "weight": 1} for name, rows in few.items()}
    made = build_mixture({"sources": weighed, "unit": "examples"})
    rows = taken(made, 130)
    assert len(asked) < 20 and Counter(name for name, _ in rows) == {"a": 65, "z": 65}
    numbers = [number for name, number in rows if name == "z"]
    assert all(sorted(numbers[i : i + size]) == list(range(size)) for i in range(0, 64 - size, size))


@pytest.mark.parametrize("kind", ["streams", "streams across"])
def test_a_trainer_finds_every_row_that_workers_have_read(kind):
    """Blocks may be shorter than what the workers take between them, so that none of their rows is the first worker's."""
    made = of_kind(kind)
    made.batch_rows = 64
    loader = iter(DataLoader(made, batch_size=64, num_workers=4, collate_fn=list))
    expected, seen = taken(of_kind(kind), 1_300), []
    for _ in range(18):
        seen += [name_of(row) for row in next(loader)]
        resumed = of_kind(kind)
        resumed.load_state_dict(json.loads(json.dumps(made.state_dict(len(seen)))))
        assert taken(resumed, 3) == expected[len(seen) : len(seen) + 3]
    assert seen == expected[: len(seen)]


def test_every_worker_leaves_its_blocks_and_old_ones_go_by_age(monkeypatch):
    monkeypatch.setattr("hf_objectives.mixture.journal._KEPT", 3)
    made = mixture({"unit": "examples"}, streams=True)
    monkeypatch.setattr("torch.utils.data.get_worker_info", lambda: None)
    taken(made, 2_000)
    assert made.state_dict(1_990)["order"]["row"] <= 1_990
    fresh = mixture({"unit": "examples"}, streams=True)
    made.load_state_dict(fresh.state_dict(0))  # from the begin again: what is written now stays
    taken(made, 300)
    resumed = mixture({"unit": "examples"}, streams=True)
    resumed.load_state_dict(json.loads(json.dumps(made.state_dict(270))))
    assert taken(resumed, 20) == taken(mixture({"unit": "examples"}, streams=True), 290)[270:]


@pytest.mark.parametrize("streams", [False, True])
def test_a_report_after_the_end_and_after_a_resume(streams):
    made = mixture({"unit": "examples"}, streams=streams, max_epochs={"a": 1, "b": 1, "c": 1})
    taken(made, 100)
    assert made.report(72).row == 72 and made.report(72)["a"].examples == 40
    if not streams:
        assert made.report(500).to_dict() == made.report(72).to_dict()
    resumed = mixture({"unit": "examples"}, streams=streams, max_epochs={"a": 1, "b": 1, "c": 1})
    resumed.load_state_dict(json.loads(json.dumps(made.state_dict(72))))
    known = resumed.report()  # of streams, up to the begin of a block, until they are read
    rows = taken(mixture({"unit": "examples"}, streams=streams, max_epochs={"a": 1, "b": 1, "c": 1}), 100)
    counted = Counter(name for name, _ in rows[: known.row])
    assert {one.name: one.examples for one in known} == counted and (streams or known.row == 72)


def test_a_source_that_will_be_repeated_often_is_told():
    made = mixture()
    passes = made.passes(1_000)
    assert passes == pytest.approx({one.name: one.epochs for one in made.report(1_000)}, rel=0.1)
    assert f"source 'c' will be repeated {passes['c']:.1f} times in 1,000 rows" in " ".join(made.expect(1_000))
    capped = mixture(max_epochs={"a": 2, "c": 4})
    assert capped.passes(1_000) == pytest.approx({one.name: one.epochs for one in capped.report(1_000)}, rel=0.1)
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
                due = made.plan.due(at)
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


def test_blocked_rows_are_never_drawn(kind):
    blocked = {"a": [0, 3, 39], "c": [6]}
    gone = {(name, number) for name, numbers in blocked.items() for number in numbers}
    made = mixture({**KINDS[kind], "blocklist": blocked}, streams=kind.startswith("streams"))
    rows = taken(made, 600)
    seen = {piece[:2] for row in rows for piece in (row if isinstance(row[0], tuple) else [row])}
    everything = {(name, n) for name, (size, *_) in LENGTHS.items() for n in range(size)}
    assert seen == everything - gone
    resumed = mixture({**KINDS[kind], "blocklist": blocked}, streams=kind.startswith("streams"))
    resumed.load_state_dict(json.loads(json.dumps(made.state_dict(411))))
    assert taken(resumed, 100) == rows[411:511]


@pytest.mark.parametrize("unit", ["tokens", "examples"])
def test_a_row_can_be_blocked_when_a_run_goes_on(unit):
    made = mixture({"unit": unit})
    rows = taken(made, 400)
    bad = rows[215]
    resumed = mixture({"unit": unit, "blocklist": {bad[0]: [bad[1]]}})
    resumed.load_state_dict(json.loads(json.dumps(made.state_dict(200))))
    after = taken(resumed, 180)
    assert bad not in after
    for name in "abc":  # each source goes on where it was, without that row
        was = [row for row in rows[200:] if row[0] == name and row != bad]
        now = [row for row in after if row[0] == name]
        shared = min(len(was), len(now))
        assert now[:shared] == was[:shared]


@pytest.mark.parametrize("streams", [False, True])
def test_spawned_workers_read_it_as_forked_ones_do(streams):
    made = mixture({"unit": "examples"}, streams=streams)
    made.batch_rows = 4
    loader = DataLoader(made, batch_size=4, num_workers=2, collate_fn=list, multiprocessing_context="spawn")
    rows = [name_of(row) for batch in itertools.islice(loader, 6) for row in batch]
    assert rows == taken(mixture({"unit": "examples"}, streams=streams), 24)
    assert made.report(24)["a"].examples == sum(name == "a" for name, _ in rows)


def test_a_mapped_file_goes_to_another_process_by_its_name(tmp_path):
    big = Dataset.from_dict({"input_ids": [list(range(500))] * 200})
    big.save_to_disk(str(tmp_path / "big"))
    made = build_mixture({"sources": {"big": Dataset.load_from_disk(str(tmp_path / "big"))}})
    assert len(pickle.dumps(made)) < 40_000
    assert next(iter(pickle.loads(pickle.dumps(made))))["input_ids"].tolist() == list(range(500))


def test_a_mixture_is_a_torch_dataset():
    loader = DataLoader(mixture(), batch_size=4, collate_fn=list)
    assert [name_of(row) for row in next(iter(loader))] == taken(mixture(), 4)
