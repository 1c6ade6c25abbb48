"""A prepared folder as a stream: every row once an epoch, shuffled anew, at once at any row, in both formats."""

from __future__ import annotations

import pickle
from collections import Counter

import pytest

from hf_objectives import demo
from hf_objectives.errors import PreparedDataError
from hf_objectives.preparation import files
from hf_objectives.preparation.config import CorpusConfig
from hf_objectives.preparation.corpus import load_prepared, prepare_corpus
from hf_objectives.preparation.stream import PreparedStream
from tests.support.corpora import TOKENIZER, write_rows


@pytest.fixture(scope="module", params=["parquet", "arrow"])
def folder(request, tmp_path_factory):
    """Two sources in many shards, one of them of several row groups."""
    folder = tmp_path_factory.mktemp("stream")
    for name, count in (("a", 2_500), ("b", 83)):
        write_rows(folder / f"{name}.jsonl", demo.texts(count, seed=len(name)))
    config = CorpusConfig(32, shard_bytes=200_000, num_proc=1, file_format=request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "READ_BYTES", 20_000)
        made = prepare_corpus({n: str(folder / f"{n}.jsonl") for n in "ab"}, TOKENIZER, folder / "out", config)
    assert max(len(shard.row_groups) for shard in made.shards) > 1 and len(made.shards) > 2
    assert [sum(shard.row_groups) for shard in made.shards] == [shard.rows for shard in made.shards]
    return folder / "out"


def key(row) -> tuple:
    return (tuple(row["sources"]), tuple(row["rows"]), tuple(map(int, row["input_ids"])), tuple(row["seq_lengths"]))


@pytest.mark.slow
def test_every_epoch_holds_every_row_once_in_a_new_order(folder):
    mapped = [key(row) for row in load_prepared(folder)]
    stream = load_prepared(folder, streaming=True)
    assert isinstance(stream, PreparedStream) and stream.num_rows == len(mapped)
    first = [key(row) for row in stream.rows(0, len(mapped))]
    second = [key(row) for row in stream.rows(len(mapped), 2 * len(mapped))]
    assert Counter(first) == Counter(second) == Counter(mapped)
    assert first != second and first != mapped
    # Mixed: the small source is not all in one place.
    of_b = [i for i, row in enumerate(first) if "b" in row[0]]
    assert of_b[-1] - of_b[0] > 2 * len(of_b)


def test_a_single_row_group_is_mixed_anew_in_every_epoch(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", demo.texts(200))
    prepare_corpus({"a": path}, TOKENIZER, tmp_path / "out", CorpusConfig(32, num_proc=1))
    stream = load_prepared(tmp_path / "out", streaming=True)
    first, second = ([key(row) for row in stream.rows(n, n + stream.num_rows)] for n in (0, stream.num_rows))
    assert sorted(first) == sorted(second) and first != second


def test_any_row_is_found_at_once(folder):
    stream = load_prepared(folder, streaming=True)
    rows = [key(row) for row in stream.rows(0, stream.num_rows + 50)]
    for n in (stream.num_rows + 49, 3, stream.num_rows - 1, 0, stream.num_rows):
        (row,) = load_prepared(folder, streaming=True).rows(n, n + 1)
        assert key(row) == rows[n]
    assert stream.order(stream.num_rows - 2, stream.num_rows + 1)[0].tolist() == [0, 0, 1]  # epochs


def test_the_order_is_the_seeds(folder):
    def first(seed):
        return [key(row) for row in load_prepared(folder, streaming=True, seed=seed).rows(0, 40)]

    assert first(1) == first(1) != first(2)


def test_it_goes_to_another_process_as_it_is(folder):
    stream = load_prepared(folder, streaming=True)
    here = [key(row) for row in stream.rows(10, 30)]
    there = pickle.loads(pickle.dumps(stream))
    assert [key(row) for row in there.rows(10, 30)] == here


def test_a_shard_that_breaks_while_it_is_read_is_named(folder, tmp_path):
    stream = load_prepared(folder, streaming=True)
    shard = stream.files[stream._shard_of[stream._in_groups(stream.order(0, 1)[1])[0][0]]]
    whole = shard.read_bytes()
    try:
        shard.write_bytes(b"x" * len(whole))
        with pytest.raises(PreparedDataError, match="cannot be read .* run hf-objectives prepare again"):
            next(iter(stream))
    finally:
        shard.write_bytes(whole)
