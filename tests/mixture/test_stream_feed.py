"""Streams as sources: resumed without reading again, and passes that are not alike named."""

from __future__ import annotations

import itertools
import json

import pytest
from datasets import Dataset, IterableDataset, disable_progress_bars, load_dataset

from hf_objectives.errors import ConfigError, DataError
from hf_objectives.mixture.build import build_mixture
from tests.support.mixtures import source, taken

disable_progress_bars()


def rows_of(n: int) -> list[dict]:
    return [{"n": i, "text": f"row {i}"} for i in range(n)]


def config(stream, **more):
    return {"sources": {"s": {"dataset": stream, "weight": 1, **more}}, "unit": "examples", "buffer_size": 7}


class Counting:
    """A stream of its own kind, which counts what is read of it."""

    def __init__(self, size: int = 40, resumes: bool = True):
        self.size, self.read, self.begin, self.at = size, 0, 0, -1
        if not resumes:
            self.state_dict = None  # type: ignore[assignment]

    def __iter__(self):
        begin, self.begin = self.begin, 0
        for at in range(begin, self.size):
            self.at, self.read = at, self.read + 1
            yield {"n": at}

    def state_dict(self):
        return {"at": self.at + 1}

    def load_state_dict(self, state):
        self.begin = state["at"]


@pytest.fixture(params=["arrow", "parquet", "json", "generator", "own"])
def stream(request, tmp_path):
    """Forty rows in several shards of several lengths."""
    rows = rows_of(40)
    if request.param == "own":
        return Counting
    if request.param == "generator":
        return lambda: IterableDataset.from_generator(_part, gen_kwargs={"parts": [(0, 11), (11, 12), (12, 40)]})
    if request.param == "arrow":
        return lambda: Dataset.from_list(rows).to_iterable_dataset(num_shards=6)
    for i, (begin, end) in enumerate([(0, 11), (11, 12), (12, 40)]):
        part = Dataset.from_list(rows[begin:end])
        if request.param == "parquet":
            part.to_parquet(tmp_path / f"{i}.parquet")
        else:
            (tmp_path / f"{i}.json").write_text("".join(json.dumps(row) + "\n" for row in rows[begin:end]))
    files = sorted(str(file) for file in tmp_path.glob(f"*.{request.param}"))
    return lambda: load_dataset(request.param, data_files=files, split="train", streaming=True)


def _part(parts):
    for begin, end in parts:
        yield from rows_of(40)[begin:end]


@pytest.mark.slow
def test_every_stream_goes_on_at_the_next_row(stream):
    expected = taken(build_mixture(config(stream())), 150)
    assert sorted(n for _, n in expected[:40]) == sorted(n for _, n in expected[40:80]) == list(range(40))
    assert expected[:40] != expected[40:80]
    made = build_mixture(config(stream()))
    taken(made, 140)
    for row in (0, 3, 7, 39, 40, 41, 80, 133):
        resumed = build_mixture(config(stream()))
        resumed.load_state_dict(json.loads(json.dumps(made.state_dict(row))))
        assert taken(resumed, 15) == expected[row : row + 15]


def test_a_stream_is_not_read_again():
    far = Counting(100_000)
    made = build_mixture({**config(far), "buffer_size": 100})
    taken(made, 20_000)
    state = made.state_dict(20_000)
    fresh = Counting(100_000)
    resumed = build_mixture({**config(fresh), "buffer_size": 100})
    resumed.load_state_dict(json.loads(json.dumps(state)))
    row = next(iter(resumed))
    assert row["n"] in range(19_900, 20_100)
    # Of the block of 130 draws the rows up to the place, and what is looked ahead.
    assert fresh.read <= 700 and len(json.dumps(state)) < 2_000


def test_a_stream_without_a_state_is_read_up_to_its_place():
    expected = [row["n"] for row in itertools.islice(build_mixture(config(rows_of_list())), 100)]
    made = build_mixture(config(rows_of_list()))
    taken_so_far = [row["n"] for row in itertools.islice(made, 60)]
    assert taken_so_far == expected[:60]
    resumed = build_mixture(config(rows_of_list()))
    resumed.load_state_dict(json.loads(json.dumps(made.state_dict(55))))
    assert [row["n"] for row in itertools.islice(resumed, 45)] == expected[55:]


class rows_of_list:
    """Iterated again and again, without a state."""

    def __iter__(self):
        return iter(rows_of(40))


class Shrinking(Counting):
    """Every pass has a row less."""

    def __iter__(self):
        self.size -= 1
        return super().__iter__()


def test_a_pass_that_ends_early_is_named():
    made = build_mixture(config(Shrinking()))
    with pytest.raises(
        DataError, match="source 's': epoch 1 ended after 36 rows, the ones before had 37; expected the same"
    ):
        taken(made, 100)


class Once(Counting):
    """Only the first passes give anything."""

    def __iter__(self):
        self.passes = getattr(self, "passes", 0) + 1
        return super().__iter__() if self.passes < 4 else iter(())


def test_a_source_that_gives_nothing_more_is_named():
    with pytest.raises(DataError, match="source 's': 0 rows in epoch 1, none of them usable"):
        taken(build_mixture(config(Once())), 100)


def test_a_row_with_other_columns_is_named():
    odd = [{"n": i} if i != 23 else {"m": i} for i in range(40)]
    again = type("Odd", (), {"__iter__": lambda self: iter(odd)})()
    with pytest.raises(DataError, match="source 's', row 23: columns m; expected n, as in the first row"):
        taken(build_mixture(config(again)), 40)


def test_nothing_is_held_out_of_a_stream():
    with pytest.raises(ConfigError, match="source 's': it is a stream, of which nothing is held out"):
        build_mixture(config(source("a").to_iterable_dataset(), eval_share=0.1))


class Going:
    """Goes on where it stands when it is iterated, as streams of torch often do."""

    def __init__(self):
        self.at = 0

    def __iter__(self):
        while self.at < 40:
            self.at += 1
            yield {"n": self.at - 1}
        self.at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


def test_a_look_at_a_stream_does_not_take_its_first_row():
    rows = taken(build_mixture(config(Going())), 80)
    assert sorted(n for _, n in rows[:40]) == sorted(n for _, n in rows[40:]) == list(range(40))
