"""Packing of a stream: nothing lost, rows full, and a state that resumes to the very next row."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_objectives.errors import ConfigError
from hf_objectives.packing import IGNORE
from hf_objectives.stream_packing import StreamPacker


def documents(sizes: list[int]) -> list[dict]:
    """Documents whose every token is a number of its own."""
    ends = np.cumsum(sizes)
    return [
        {"input_ids": list(range(end - size, end)), "source": "ab"[i % 2], "row": i}
        for i, (size, end) in enumerate(zip(sizes, ends.tolist(), strict=True))
    ]


def plain(rows) -> list[dict]:
    return [{name: list(map(_plain, values)) for name, values in row.items()} for row in rows]


def _plain(value):
    return value.item() if isinstance(value, np.generic) else value


def test_by_hand():
    rows = plain(StreamPacker(documents([3, 2, 4, 1]), 5, buffer_size=3))
    # Three wait; the oldest (3) and the largest that fits (2); then 4 with 1.
    assert rows == [
        {"input_ids": [0, 1, 2, 3, 4], "labels": [IGNORE, 1, 2, IGNORE, 4], "seq_lengths": [3, 2], "sources": ["a", "b"],
         "rows": [0, 1]},
        {"input_ids": [5, 6, 7, 8, 9], "labels": [IGNORE, 6, 7, 8, IGNORE], "seq_lengths": [4, 1], "sources": ["a", "b"],
         "rows": [2, 3]},
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("overflow", "rows", "lost"),
    [
        ("split", [[0, 1, 2, 3], [4, 5, 6], [7]], 0),
        ("truncate", [[0, 1, 2, 3], [7]], 3),
        ("drop", [[7]], 7),
    ],
)
def test_overflow_by_hand(overflow, rows, lost):
    packer = StreamPacker([{"input_ids": range(7)}, {"input_ids": [7, 8]}], 4, buffer_size=1, overflow=overflow)
    made = [row["input_ids"].tolist() for row in packer]
    assert made == [[7, 8] if row == [7] else row for row in rows]
    assert packer.counts["dropped: longer than max_length"] == lost


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(0, 30), max_size=60),
    st.integers(2, 20),
    st.integers(1, 12),
    st.sampled_from(["split", "truncate", "drop"]),
)
def test_every_token_is_in_a_row_or_counted(sizes, max_length, buffer_size, overflow):
    packer = StreamPacker(documents(sizes), max_length, buffer_size=buffer_size, overflow=overflow)
    rows = list(packer)
    tokens = np.concatenate([row["input_ids"] for row in rows] or [np.empty(0)]).tolist()
    assert len(set(tokens)) == len(tokens) == packer.counts["tokens_out"]
    lost = sum(count for reason, count in packer.counts.items() if reason.startswith("dropped"))
    assert packer.counts["tokens_in"] == sum(sizes) == len(tokens) + lost
    for row in rows:
        assert len(row["input_ids"]) == row["seq_lengths"].sum() <= max_length
        begins = np.cumsum(row["seq_lengths"]) - row["seq_lengths"]
        expected = row["input_ids"].copy()
        expected[begins] = IGNORE
        assert np.array_equal(row["labels"], expected) and (expected != IGNORE).any()


class Stateful:
    """A source that knows where it stands, and counts what it reads."""

    def __init__(self, rows):
        self.rows, self.at, self.read = rows, 0, 0

    def __iter__(self):
        begin, self.at = self.at, 0
        for i in range(begin, len(self.rows)):
            self.at, self.read = i + 1, self.read + 1
            yield self.rows[i]
        self.at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=50), st.integers(1, 10), st.data())
def test_resumed_anywhere_it_goes_on_with_the_very_next_row(sizes, buffer_size, data):
    whole = plain(StreamPacker(documents(sizes), 12, buffer_size=buffer_size))
    for make in (list, Stateful):
        packer = StreamPacker(make(documents(sizes)), 12, buffer_size=buffer_size)
        made, rows = [], iter(packer)
        for _ in range(data.draw(st.integers(0, 2))):  # stopped and resumed up to twice
            for _ in range(data.draw(st.integers(0, len(whole)))):
                made += plain([row] if (row := next(rows, None)) is not None else [])
            state = pickle.loads(pickle.dumps(packer.state_dict()))
            if len(made) == len(whole):
                break
            packer = StreamPacker(make(documents(sizes)), 12, buffer_size=buffer_size)
            packer.load_state_dict(state)
            rows = iter(packer)
        assert made + plain(rows) == whole
        assert packer.counts["tokens_in"] == sum(sizes)


def test_a_source_with_a_state_is_not_read_again():
    packer = StreamPacker(Stateful(documents([5] * 100)), 10, buffer_size=10)
    rows = iter(packer)
    for _ in range(20):
        next(rows)
    source = Stateful(documents([5] * 100))
    resumed = StreamPacker(source, 10, buffer_size=10)
    resumed.load_state_dict(packer.state_dict())
    assert len(list(resumed)) == 30 and source.read == 100 - packer.counts["documents"]


def test_a_stream_of_datasets_resumes():
    rows = Dataset.from_list(documents([7, 3, 12, 1, 9] * 20))
    whole = plain(StreamPacker(rows.to_iterable_dataset(num_shards=4), 12, buffer_size=9))
    packer = StreamPacker(rows.to_iterable_dataset(num_shards=4), 12, buffer_size=9)
    first = iter(packer)
    made = plain(next(first) for _ in range(17))
    resumed = StreamPacker(rows.to_iterable_dataset(num_shards=4), 12, buffer_size=9)
    resumed.load_state_dict(packer.state_dict())
    assert made + plain(resumed) == whole


def test_a_thousand_documents_fill_rows_to_99_percent():
    lengths = np.clip(np.random.default_rng(0).lognormal(5.5, 0.95, 30_000).astype(int), 1, None)
    assert 350 < lengths.mean() < 430
    packer = StreamPacker(({"input_ids": np.zeros(n, np.int32)} for n in lengths), 2048)
    assert sum(1 for _ in packer) == packer.counts["rows"] and packer.fill > 0.99


def test_a_second_pass_begins_again():
    packer = StreamPacker(documents([3, 2, 4, 1]), 5)
    assert plain(packer) == plain(packer) and packer.counts["documents"] == 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_length": 1}, "max_length is 1"),
        ({"buffer_size": 0}, "buffer_size is 0"),
        ({"overflow": "cut"}, "overflow is 'cut'; expected one of truncate, split, drop"),
    ],
)
def test_bad_settings_are_named(options, words):
    with pytest.raises(ConfigError, match=words):
        StreamPacker([], **{"max_length": 4, **options})
