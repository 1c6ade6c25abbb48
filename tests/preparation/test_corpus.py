"""Prepared folders: every token accounted for, finished shards kept, other settings refused, one process at a time."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, disable_progress_bars, load_dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_objectives import demo
from hf_objectives.errors import (
    ConfigError,
    DiskFullError,
    FileFormatError,
    FormatError,
    NothingSupervisedError,
    PreparedDataError,
)
from hf_objectives.preparation.config import CorpusSettings
from hf_objectives.preparation.corpus import load_prepared, prepare_corpus
from hf_objectives.preparation.dataset import prepare_dataset
from hf_objectives.preparation.manifest import Manifest
from tests.support.chat_corpus import byte_tokenizer

ROOT = Path(__file__).parents[2]
disable_progress_bars()
TOKENIZER = byte_tokenizer()
EOS = TOKENIZER.eos_token_id
SMALL = {"max_length": 64, "shard_bytes": 2_000, "num_proc": 1}


def write_texts(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def documents(rows) -> list[list[int]]:
    """Token ids of the documents of packed rows: the pieces that fill a row in order, then the rest."""
    pieces: dict[tuple[str, int], list[list[int]]] = {}
    for row in rows:
        at = 0
        for length, source, number in zip(row["seq_lengths"], row["sources"], row["rows"], strict=True):
            pieces.setdefault((source, number), []).append(row["input_ids"][at : at + length])
            at += length
        assert at == len(row["input_ids"]) <= 64
    whole_first = (sorted(pieces[key], key=lambda piece: len(piece) < 64) for key in sorted(pieces))
    return [[token for piece in document for token in piece] for document in whole_first]


def balanced(manifest: Manifest) -> None:
    for account in manifest.sources.values():
        kept = sum(account[split]["tokens"] for split in ("train", "validation") if split in account)
        assert account["tokens_in"] == kept + sum(account["dropped_tokens"].values())
    for name in ("tokens", "supervised"):
        by_source = sum(
            account[split][name]
            for account in manifest.sources.values()
            for split in ("train", "validation")
            if split in account
        )
        assert by_source == sum(getattr(shard, name) for shard in manifest.shards)


# Characters of every kind, control characters and unassigned ones too; lone surrogates are no text.
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=90)


@settings(max_examples=40, deadline=None)
@given(
    texts=st.lists(
        st.one_of(TEXTS, st.just(""), st.just("x" * 63), st.just("y" * 64), st.just("<|im_end|>")), max_size=30
    ),
    strategy=st.sampled_from(["best_fit", "concat"]),
    labels=st.sampled_from(["auto", "always"]),
)
def test_no_token_is_lost(tmp_path_factory, texts, strategy, labels):
    folder = tmp_path_factory.mktemp("corpus")
    texts = ["start", *texts]
    path = write_texts(folder / "a.jsonl", texts)
    made = prepare_corpus(
        {"a": path}, TOKENIZER, folder / "out", CorpusSettings(strategy=strategy, labels=labels, **SMALL)
    )
    balanced(made)
    rows = list(load_prepared(folder / "out"))
    if strategy == "concat":  # rows are one stream
        ids = np.concatenate([row["input_ids"] for row in rows])
        found = [list(part) for part in np.split(ids, np.flatnonzero(ids == EOS) + 1) if len(part)]
    else:
        found = documents(rows)
    back = [TOKENIZER.decode(ids[:-1]) for ids in found]
    # A last row of one token trains nothing and is left out; its token is in the account.
    if not made.sources["a"]["dropped_tokens"]:
        assert all(ids[-1] == EOS for ids in found)
        assert back == [text for text in texts if text.strip()]
    assert made.sources["a"]["documents_in"] == len(texts)
    assert made.sources["a"]["train"]["supervised"] == sum(
        sum(max(0, length - 1) for length in row["seq_lengths"]) for row in rows
    )
    if labels == "always":
        for row in rows:
            begins = np.cumsum([0, *row["seq_lengths"][:-1]])
            assert all(row["labels"][i] == -100 for i, n in zip(begins, row["seq_lengths"], strict=True) if n)
            assert sum(label != -100 for label in row["labels"]) == len(row["labels"]) - len(row["seq_lengths"])


def test_overflow_is_counted(tmp_path):
    path = write_texts(tmp_path / "a.jsonl", ["x" * 200, "short"])
    for overflow, lost in (("truncate", 201 - 64), ("drop", 201), ("split", 0)):
        made = prepare_corpus({"a": path}, TOKENIZER, tmp_path / overflow, CorpusSettings(overflow=overflow, **SMALL))
        balanced(made)
        assert made.sources["a"]["dropped_tokens"] == ({"longer than max_length": lost} if lost else {})


def test_the_summary_says_what_became_of_every_token():
    account = {
        **{"documents_in": 1_200, "documents": 1_195, "tokens_in": 6_000},
        **{"dropped_tokens": {"longer than max_length": 1_000}, "train": {"tokens": 5_000}},
        "dropped_documents": {"longer than max_length": 4, "FormatError, skipped": 1},
    }
    manifest = Manifest({"eval_share": 0.1, "max_length": 64}, sources={"a": account}, broken=2, broken_named=["x"])
    assert manifest.lines() == [
        "a: 1,200 documents, 6,000 tokens = 5,000 train + 1,000 dropped (longer than max_length, 4 documents); "
        "1 documents: FormatError, skipped; no document held out",
        "2 broken records skipped, such as x",
    ]


def test_ids_are_stored_small_and_folders_load_anywhere(tmp_path):
    path = write_texts(tmp_path / "a.jsonl", [row["text"] for row in demo.texts(300)])
    prepare_corpus({"a": path}, TOKENIZER, tmp_path / "out", CorpusSettings(eval_share=0.2, **SMALL))
    plain = load_dataset("parquet", data_dir=str(tmp_path / "out"))
    assert plain["train"].features["input_ids"].feature.dtype == "uint16"
    assert {len(load_prepared(tmp_path / "out", split)) for split in plain} == {len(plain[split]) for split in plain}
    stream = load_dataset("parquet", data_dir=str(tmp_path / "out"), split="train", streaming=True)
    assert sorted(map(str, stream)) == sorted(map(str, plain["train"]))
    seen = {split: {row for rows in plain[split]["rows"] for row in rows} for split in plain}
    assert seen["train"].isdisjoint(seen["validation"]) and 30 < len(seen["validation"]) < 90


def test_arrow_shards_hold_the_same_rows(tmp_path):
    path = write_texts(tmp_path / "a.jsonl", [row["text"] for row in demo.texts(100)])
    rows = []
    for kind in ("parquet", "arrow"):
        prepare_corpus({"a": path}, TOKENIZER, tmp_path / kind, CorpusSettings(file_format=kind, **SMALL))
        rows.append([dict(row) for row in load_prepared(tmp_path / kind)])
    assert rows[0] == rows[1] and len(rows[0]) > 3


def test_workers_change_nothing(tmp_path):
    path = write_texts(tmp_path / "a.jsonl", [row["text"] for row in demo.texts(400)])
    made = [
        prepare_corpus({"a": path}, TOKENIZER, tmp_path / str(n), CorpusSettings(**{**SMALL, "num_proc": n}))
        for n in (1, 2, 3)
    ]
    assert len(made[0].shards) > 5 and made[0].shards == made[1].shards == made[2].shards


def test_chats_and_texts_side_by_side(tmp_path):
    texts = write_texts(tmp_path / "a.jsonl", [row["text"] for row in demo.texts(50)])
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in demo.chats(50)))
    sources = {"texts": texts, "chats": {"path": str(tmp_path / "chats.jsonl"), "weight": 3}}
    made = prepare_corpus(sources, demo.build_tokenizer(), tmp_path / "out", CorpusSettings(max_length=256, num_proc=1))
    balanced(made)
    assert {"texts", "chat", "tool"} == set(made.sources) and made.policy["labels"]
    for row in load_prepared(tmp_path / "out"):
        trained = sum(label != -100 for label in row["labels"])
        assert trained == len(row["labels"]) - len(row["seq_lengths"]) if row["sources"][0] == "texts" else trained
    assert made.sources["chat"]["train"]["supervised"] < made.sources["chat"]["train"]["tokens"] / 2


# -- what is kept ----------------------------------------------------------------------------------------------------


@pytest.fixture
def prepared(tmp_path):
    files = [write_texts(tmp_path / f"{n}.jsonl", [f"{n} {row['text']}" for row in demo.texts(60)]) for n in "ab"]
    sources = {"one": str(tmp_path / "?.jsonl")}
    prepare_corpus(sources, TOKENIZER, tmp_path / "out", CorpusSettings(**SMALL))
    return tmp_path / "out", sources, files


def shards(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (folder / "train").iterdir()}


def test_a_second_run_makes_nothing_again(prepared):
    folder, sources, _ = prepared
    before = shards(folder)
    weighted = {"one": {"path": sources["one"], "weight": 7}}
    prepare_corpus(weighted, TOKENIZER, folder, CorpusSettings(**SMALL))
    assert shards(folder) == before and len(before) > 4


def test_a_damaged_shard_is_made_again_alone(prepared):
    folder, sources, _ = prepared
    before = shards(folder)
    (damaged, missing), rows = sorted(before)[:2], list(load_prepared(folder))
    content = (folder / "train" / damaged).read_bytes()
    (folder / "train" / damaged).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    (folder / "train" / missing).unlink()
    prepare_corpus(sources, TOKENIZER, folder, CorpusSettings(**SMALL))
    after = shards(folder)
    assert {name for name in before if after[name] != before[name]} == {damaged, missing}
    assert list(load_prepared(folder)) == rows


def test_an_interrupted_run_goes_on(prepared, monkeypatch):
    folder, sources, _ = prepared
    rows, names = list(load_prepared(folder)), sorted(shards(folder))
    shutil.rmtree(folder)
    from hf_objectives.preparation.work import Work

    whole, calls = Work.__call__, []

    def interrupted(self, segment):
        calls.append(segment)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return whole(self, segment)

    monkeypatch.setattr(Work, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare_corpus(sources, TOKENIZER, folder, CorpusSettings(**SMALL))
    with pytest.raises(PreparedDataError, match="not finished .3 of "):
        load_prepared(folder)
    before = shards(folder)
    calls[:] = [None] * 10
    prepare_corpus(sources, TOKENIZER, folder, CorpusSettings(**SMALL))
    assert len(calls) == 10 + len(names) - 3
    assert {name: shards(folder)[name] for name in before} == before
    assert list(load_prepared(folder)) == rows


def test_new_files_are_added_and_gone_ones_removed(prepared):
    folder, sources, files = prepared
    before = shards(folder)
    write_texts(Path(files[0]).with_name("c.jsonl"), ["something new"])
    prepare_corpus(sources, TOKENIZER, folder, CorpusSettings(**SMALL))
    assert len(set(shards(folder)) - set(before)) == 1 and set(before) <= set(shards(folder))
    Path(files[1]).unlink()
    made = prepare_corpus(sources, TOKENIZER, folder, CorpusSettings(**SMALL))
    assert {Path(shard.path).name for shard in made.shards} == set(shards(folder))
    assert {Path(shard.file).name for shard in made.shards} == {"a.jsonl", "c.jsonl"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"max_length": 128}, "max_length: 64 there, 128 asked for"),
        ({"chat_template": "{{ messages }}"}, "chat_template: "),
        ({"strategy": "concat"}, "strategy: 'best_fit' there, 'concat' asked for"),
        ({"labels": "always"}, "labels: False there, True asked for"),
    ],
)
def test_other_settings_are_refused_with_the_difference(prepared, change, words):
    folder, sources, _ = prepared
    before = shards(folder)
    with pytest.raises(PreparedDataError, match=words):
        prepare_corpus(sources, TOKENIZER, folder, CorpusSettings(**{**SMALL, **change}))
    assert shards(folder) == before
    prepare_corpus(sources, TOKENIZER, folder, CorpusSettings(**{**SMALL, **change}), overwrite=True)
    assert not set(before) & set(shards(folder))


def test_another_tokenizer_or_template_is_refused(prepared):
    folder, sources, _ = prepared
    load_prepared(folder, tokenizer=TOKENIZER, expect={"max_length": 64})
    with pytest.raises(PreparedDataError, match="max_length: 64 there, 32 asked for"):
        load_prepared(folder, expect={"max_length": 32})
    other = demo.build_tokenizer()
    with pytest.raises(PreparedDataError, match="tokenizer: "):
        load_prepared(folder, tokenizer=other)
    with pytest.raises(PreparedDataError, match="tokenizer: "):
        prepare_corpus(sources, other, folder, CorpusSettings(**SMALL))
    edited = byte_tokenizer()
    edited.chat_template = (TOKENIZER.chat_template or "") + " "
    with pytest.raises(PreparedDataError, match="chat_template: "):
        load_prepared(folder, tokenizer=edited)
    with pytest.raises(PreparedDataError, match="no validation split; prepare it with eval_share"):
        load_prepared(folder, "validation")
    values = json.loads((folder / "manifest.json").read_text())
    values["policy"]["preparation_version"] = 0
    (folder / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(PreparedDataError, match="prepared under version 0 of the rows; this is version 2"):
        load_prepared(folder)


def test_what_is_missing_is_said_before_training(prepared):
    folder, _, _ = prepared
    with pytest.raises(PreparedDataError, match="holds no manifest.json"):
        load_prepared(folder.parent)
    (folder / "train" / sorted(shards(folder))[0]).unlink()
    with pytest.raises(PreparedDataError, match="missing or cut off"):
        load_prepared(folder)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(PreparedDataError, match="is damaged"):
        load_prepared(folder)


# -- bad input -------------------------------------------------------------------------------------------------------


def test_a_wrong_record_in_the_middle_is_named_or_counted(tmp_path):
    path = write_texts(tmp_path / "a.jsonl", ["good", "fine", "well"])
    lines = Path(path).read_text().splitlines(True)
    lines[1:1] = ['{"text": 3}\n', '{"text": "half \\ud800"}\n', '{"body": "x"}\n', "{\n"]
    Path(path).write_text("".join(lines))
    strict = CorpusSettings(**SMALL)
    with pytest.raises(FileFormatError, match="a.jsonl, line 5: not valid JSON"):
        prepare_corpus({"a": path}, TOKENIZER, tmp_path / "out", strict)
    Path(path).write_text("".join(lines[:-3] + lines[-2:]))
    with pytest.raises(FormatError, match="source 'a', row 1: text is int; expected a string .*a.jsonl, line 2"):
        prepare_corpus({"a": path}, TOKENIZER, tmp_path / "out", strict)
    Path(path).write_text("".join(lines))
    made = prepare_corpus({"a": path}, TOKENIZER, tmp_path / "out", CorpusSettings(on_error="skip", **SMALL))
    assert made.broken == 1 and "line 5: not valid JSON" in made.broken_named[0]
    account = made.sources["a"]
    assert account["dropped_documents"] == {"FormatError, skipped": 3} and account["documents"] == 3
    assert account["dropped_examples"] == {"FormatError, skipped": [1, 2, 3]}
    balanced(made)
    with pytest.raises(FileFormatError, match="a.jsonl, line 5: not valid JSON"):  # not content with what was skipped
        prepare_corpus({"a": path}, TOKENIZER, tmp_path / "out", strict)


def test_a_lone_surrogate_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n{"text": "half \\ud800"}\n')
    with pytest.raises(FormatError, match="row 1: half of a surrogate pair"):
        prepare_corpus({"a": str(tmp_path / "a.jsonl")}, TOKENIZER, tmp_path / "out", CorpusSettings(**SMALL))


def test_nothing_to_train_on(tmp_path):
    path = write_texts(tmp_path / "a.jsonl", ["", "  \n"])
    with pytest.raises(NothingSupervisedError, match="no token would be trained; a: 2 documents"):
        prepare_corpus({"a": path}, TOKENIZER, tmp_path / "out", CorpusSettings(**SMALL))


@pytest.mark.parametrize(
    ("sources", "options", "words"),
    [
        ({}, {}, "no sources"),
        ({"a": 3}, {}, "source 'a' is int; expected a path or a mapping"),
        ({"a": {"pth": "x"}}, {}, "source 'a': unknown key 'pth'; did you mean 'path'"),
        ({"a": {"path": ""}}, {}, "path is ''; expected a file"),
        ({"a": {"path": "x", "documents": "lines"}}, {}, "did you mean 'line'"),
        ({"a": "x.jsonl"}, {"engine": "spark"}, "engine is 'spark'; expected one of local, ray"),
        ({"a": "x.jsonl"}, {"file_format": "csv"}, "file_format is 'csv'; expected one of parquet, arrow"),
        ({"a": "x.jsonl"}, {"on_error": "skp"}, "did you mean 'skip'"),
        ({"a": "x.jsonl"}, {"eval_share": 1.0}, "eval_share is 1.0"),
        ({"a": "x.jsonl"}, {"shard_bytes": 0}, "shard_bytes is 0"),
        ({"a": "x.jsonl"}, {"strategy": "bfd"}, "strategy is 'bfd'"),
    ],
)
def test_bad_settings_are_named(tmp_path, sources, options, words):
    with pytest.raises(ConfigError, match=words):
        prepare_corpus(sources, TOKENIZER, tmp_path, CorpusSettings(**options))


def test_a_full_disk_keeps_what_is_finished(prepared, monkeypatch):
    folder, sources, _ = prepared
    rows = list(load_prepared(folder))
    shutil.rmtree(folder)
    import pyarrow.parquet as pq

    whole, calls = pq.ParquetWriter.write_table, []

    def full(self, *args, **kwargs):
        calls.append(None)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    with pytest.raises(DiskFullError, match=r"no space left to write .*; 2 of \d+ segments are finished and kept"):
        prepare_corpus(sources, TOKENIZER, folder, CorpusSettings(**SMALL))
    assert len(shards(folder)) == 2 and not list((folder / ".progress").glob("*.parquet"))
    prepare_corpus(sources, TOKENIZER, folder, CorpusSettings(**SMALL))
    assert list(load_prepared(folder)) == rows


# -- datasets --------------------------------------------------------------------------------------------------------


def test_a_dataset_goes_to_disk(tmp_path):
    rows = Dataset.from_list(demo.texts(5_000))
    packed = prepare_dataset(rows, TOKENIZER, max_length=512, output_dir=tmp_path / "out", num_proc=2)
    in_memory = prepare_dataset(rows, TOKENIZER, max_length=512)
    assert sum(map(len, packed["input_ids"])) == sum(map(len, in_memory["input_ids"]))
    before = shards(tmp_path / "out")
    prepare_dataset(rows, TOKENIZER, max_length=512, output_dir=tmp_path / "out")
    assert shards(tmp_path / "out") == before
    with pytest.raises(ConfigError, match="output_dir needs files or a datasets.Dataset"):
        prepare_dataset(demo.texts(5), TOKENIZER, max_length=512, output_dir=tmp_path / "out")


def test_paths_without_a_folder_stay_in_memory(tmp_path):
    path = write_texts(tmp_path / "a.jsonl", [row["text"] for row in demo.texts(20)])
    one = prepare_dataset(path, TOKENIZER, max_length=64)
    named = prepare_dataset({"a": path, "b": path}, TOKENIZER, max_length=64)
    assert sum(map(len, named["input_ids"])) == 2 * sum(map(len, one["input_ids"]))
    assert {name for names in named["sources"] for name in names} == {"a", "b"}
