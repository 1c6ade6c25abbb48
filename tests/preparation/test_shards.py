"""Shards: written whole or not at all, small, in a form that plain readers load."""

from __future__ import annotations

import errno
import random

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset

from hf_objectives.errors import DiskFullError, PreparedDataError
from hf_objectives.preparation.config import CorpusConfig
from hf_objectives.preparation.corpus import load_prepared, prepare_corpus
from hf_objectives.preparation.shards import smallest_type
from tests.support.corpora import SMALL, TOKENIZER, shard_times, write_demo


def test_ids_are_stored_small_and_folders_load_anywhere(tmp_path):
    path = write_demo(tmp_path / "a.jsonl", 100)
    prepare_corpus({"a": path}, TOKENIZER, tmp_path / "out", CorpusConfig(eval_share=0.2, **SMALL))
    plain = load_dataset("parquet", data_dir=str(tmp_path / "out"))
    assert plain["train"].features["input_ids"].feature.dtype == "uint16" and set(plain) == {"train", "validation"}
    for row in plain["train"]:
        assert row["position_ids"] == [place for length in row["seq_lengths"] for place in range(length)]
    assert {len(load_prepared(tmp_path / "out", split)) for split in plain} == {len(plain[split]) for split in plain}
    stream = load_dataset("parquet", data_dir=str(tmp_path / "out"), split="train", streaming=True)
    assert sorted(map(str, stream)) == sorted(map(str, plain["train"]))


@pytest.mark.parametrize(
    ("vocabulary", "kind"), [(256, np.uint8), (257, np.uint16), (65_536, np.uint16), (65_537, np.uint32)]
)
def test_the_smallest_type_that_holds_every_id(vocabulary, kind):
    assert smallest_type(vocabulary) is kind


def test_arrow_shards_hold_the_same_rows(tmp_path):
    path = write_demo(tmp_path / "a.jsonl", 100)
    rows = []
    for kind in ("parquet", "arrow"):
        prepare_corpus({"a": path}, TOKENIZER, tmp_path / kind, CorpusConfig(file_format=kind, **SMALL))
        rows.append([dict(row) for row in load_prepared(tmp_path / kind)])
    assert rows[0] == rows[1] and len(rows[0]) > 3


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_no_flipped_bit_of_a_shard_loads_as_other_rows(tmp_path, kind, streaming):
    """A mapped dataset is refused. A stream is, too, or has the rows that were written."""
    path, folder = write_demo(tmp_path / "a.jsonl", 60), tmp_path / "out"
    (shard,) = prepare_corpus(
        {"a": path}, TOKENIZER, folder, CorpusConfig(file_format=kind, num_proc=1, max_length=128)
    ).shards
    stream = load_prepared(folder, streaming=True)
    written, file = list(map(repr, stream.rows(0, shard.rows))), folder / shard.path
    whole, draw, refused = file.read_bytes(), random.Random(0), 0
    for place in [*range(8), *(len(whole) - 1 - i for i in range(8)), *draw.sample(range(len(whole)), 40)]:
        changed = bytearray(whole)
        changed[place] ^= 1 << draw.randrange(8)
        file.write_bytes(changed)
        try:
            dataset = load_prepared(folder, streaming=streaming)
            found = list(map(repr, dataset.rows(0, shard.rows)))
        except PreparedDataError as error:
            assert str(file) in str(error)
            refused += 1
        else:
            assert streaming and found == written
    assert refused > (28 if streaming else 55)
    with pytest.raises(PreparedDataError, match="fails its checksum; run hf-objectives prepare again"):
        load_prepared(folder, streaming=streaming, verify=True)
    load_prepared(folder, streaming=True, verify=False)


def test_an_offset_beyond_its_values_is_refused_and_does_not_end_the_process(tmp_path):
    """A bit high up in where a name of a source ends, in a stream of Arrow: reading it was a segmentation fault."""
    path, folder = write_demo(tmp_path / "a.jsonl", 60), tmp_path / "out"
    (shard,) = prepare_corpus(
        {"a": path}, TOKENIZER, folder, CorpusConfig(file_format="arrow", num_proc=1, max_length=128)
    ).shards
    file = folder / shard.path
    whole = file.read_bytes()
    ends = b"".join(i.to_bytes(4, "little") for i in range(5))  # offsets of one-letter names: 0, 1, 2, 3, 4
    assert whole.count(ends) >= 1
    for place in range(whole.rindex(ends) + 7, whole.rindex(ends) + 20, 4):
        changed = bytearray(whole)
        changed[place] ^= 1 << 6
        file.write_bytes(changed)
        with pytest.raises(PreparedDataError, match="cannot be read"):
            list(load_prepared(folder, streaming=True).rows(0, shard.rows))


def test_a_full_disk_keeps_what_is_finished(tmp_path, monkeypatch):
    sources, folder = {"a": write_demo(tmp_path / "a.jsonl", 100)}, tmp_path / "out"
    prepare_corpus(sources, TOKENIZER, tmp_path / "whole", CorpusConfig(**SMALL))
    write, calls = pq.ParquetWriter.write_table, []

    def full(self, *args, **kwargs):
        calls.append(None)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, *args, **kwargs)

    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    with pytest.raises(DiskFullError, match=r"no space left to write .*; 2 of \d+ segments are finished and kept"):
        prepare_corpus(sources, TOKENIZER, folder, CorpusConfig(**SMALL))
    assert len(shard_times(folder)) == 2 and not list((folder / ".progress").glob("*.parquet"))
    prepare_corpus(sources, TOKENIZER, folder, CorpusConfig(**SMALL))
    assert list(load_prepared(folder)) == list(load_prepared(tmp_path / "whole"))
