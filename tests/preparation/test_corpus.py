"""Prepared folders: finished shards are kept, other options refused, and a failure leaves what was finished."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from datasets import Dataset

from hf_objectives import demo
from hf_objectives.errors import ConfigError, NothingSupervisedError, PreparedDataError
from hf_objectives.preparation.config import CorpusConfig
from hf_objectives.preparation.corpus import load_prepared, prepare_corpus
from hf_objectives.preparation.dataset import prepare_dataset
from hf_objectives.preparation.manifest import Manifest
from hf_objectives.preparation.work import Work
from tests.support.chat_corpus import byte_tokenizer
from tests.support.corpora import SMALL, TOKENIZER, shard_times, write_demo, write_texts


@pytest.fixture(scope="module")
def made_once(tmp_path_factory):
    """A prepared folder of two files; tests take a copy."""
    folder = tmp_path_factory.mktemp("corpus")
    for n in "ab":
        write_texts(folder / f"{n}.jsonl", [f"{n} {row['text']}" for row in demo.texts(60)])
    prepare_corpus({"one": str(folder / "?.jsonl")}, TOKENIZER, folder / "out", CorpusConfig(**SMALL))
    return folder


@pytest.fixture
def prepared(made_once, tmp_path):
    """The folder, its sources and its files. The files stay where they are: their path is part of a shard's name."""
    shutil.copytree(made_once / "out", tmp_path / "out")
    return tmp_path / "out", {"one": str(made_once / "?.jsonl")}


def test_a_second_run_makes_nothing_again(prepared):
    folder, sources = prepared
    before = shard_times(folder)
    weighted = {"one": {"path": sources["one"], "weight": 7}}
    prepare_corpus(weighted, TOKENIZER, folder, CorpusConfig(**SMALL))
    assert shard_times(folder) == before and len(before) > 4


def test_a_damaged_shard_is_made_again_alone(prepared):
    folder, sources = prepared
    before = shard_times(folder)
    (damaged, missing), rows = sorted(before)[:2], list(load_prepared(folder))
    content = (folder / "train" / damaged).read_bytes()
    (folder / "train" / damaged).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    (folder / "train" / missing).unlink()
    prepare_corpus(sources, TOKENIZER, folder, CorpusConfig(**SMALL))
    after = shard_times(folder)
    assert {name for name in before if after[name] != before[name]} == {damaged, missing}
    assert list(load_prepared(folder)) == rows


def test_an_interrupted_run_goes_on(prepared, monkeypatch):
    folder, sources = prepared
    rows, names = list(load_prepared(folder)), sorted(shard_times(folder))
    shutil.rmtree(folder)
    whole, calls = Work.__call__, []

    def interrupted(self, segment):
        calls.append(segment)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return whole(self, segment)

    monkeypatch.setattr(Work, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare_corpus(sources, TOKENIZER, folder, CorpusConfig(**SMALL))
    with pytest.raises(PreparedDataError, match="not finished .3 of "):
        load_prepared(folder)
    before = shard_times(folder)
    calls[:] = [None] * 10
    prepare_corpus(sources, TOKENIZER, folder, CorpusConfig(**SMALL))
    assert len(calls) == 10 + len(names) - 3
    assert {name: shard_times(folder)[name] for name in before} == before
    assert list(load_prepared(folder)) == rows


def test_new_files_are_added_and_gone_ones_removed(tmp_path):
    for n in "ab":
        write_texts(tmp_path / f"{n}.jsonl", [f"{n} {row['text']}" for row in demo.texts(60)])
    sources, folder, config = {"one": str(tmp_path / "?.jsonl")}, tmp_path / "out", CorpusConfig(**SMALL)
    prepare_corpus(sources, TOKENIZER, folder, config)
    before = shard_times(folder)
    write_texts(tmp_path / "c.jsonl", ["something new"])
    prepare_corpus(sources, TOKENIZER, folder, config)
    assert len(set(shard_times(folder)) - set(before)) == 1 and set(before) <= set(shard_times(folder))
    (tmp_path / "b.jsonl").unlink()
    made = prepare_corpus(sources, TOKENIZER, folder, config)
    assert {Path(shard.path).name for shard in made.shards} == set(shard_times(folder))
    assert {Path(shard.file).name for shard in made.shards} == {"a.jsonl", "c.jsonl"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"max_length": 128}, "max_length: 64 there, 128 asked for"),
        ({"chat_template": "{{ messages }}"}, "chat_template: "),
        ({"labels": "always"}, "labels: False there, True asked for"),
    ],
)
def test_other_options_are_refused_with_the_difference(prepared, change, words):
    folder, sources = prepared
    before = shard_times(folder)
    with pytest.raises(PreparedDataError, match=words):
        prepare_corpus(sources, TOKENIZER, folder, CorpusConfig(**{**SMALL, **change}))
    assert shard_times(folder) == before
    prepare_corpus(sources, TOKENIZER, folder, CorpusConfig(**{**SMALL, **change}), overwrite=True)
    assert not set(before) & set(shard_times(folder))


def test_another_tokenizer_or_template_is_refused(prepared):
    folder, sources = prepared
    load_prepared(folder, tokenizer=TOKENIZER, expect={"max_length": 64})
    with pytest.raises(PreparedDataError, match="max_length: 64 there, 32 asked for"):
        load_prepared(folder, expect={"max_length": 32})
    other = demo.build_tokenizer()
    with pytest.raises(PreparedDataError, match="tokenizer: "):
        load_prepared(folder, tokenizer=other)
    with pytest.raises(PreparedDataError, match="tokenizer: "):
        prepare_corpus(sources, other, folder, CorpusConfig(**SMALL))
    edited = byte_tokenizer()
    edited.chat_template = (TOKENIZER.chat_template or "") + " "
    with pytest.raises(PreparedDataError, match="chat_template: "):
        load_prepared(folder, tokenizer=edited)


def test_what_is_missing_is_said_before_training(prepared):
    folder, _ = prepared
    with pytest.raises(PreparedDataError, match="no validation split; prepare it with eval_share"):
        load_prepared(folder, "validation")
    with pytest.raises(PreparedDataError, match="has no source 'two'; expected one of one"):
        load_prepared(folder, sources=["two"])
    (folder / "train" / sorted(shard_times(folder))[0]).unlink()
    with pytest.raises(PreparedDataError, match="missing or cut off"):
        load_prepared(folder)


def test_nothing_to_train_on(tmp_path):
    path = write_texts(tmp_path / "a.jsonl", ["", "  \n"])
    with pytest.raises(NothingSupervisedError, match="no token would be trained; a: 2 rows"):
        prepare_corpus({"a": path}, TOKENIZER, tmp_path / "out", CorpusConfig(**SMALL))
    with pytest.raises(ConfigError, match="no sources"):
        prepare_corpus({}, TOKENIZER, tmp_path / "out")


def test_sources_have_names(tmp_path):
    for sources in ("texts.jsonl", ["texts.jsonl"]):
        with pytest.raises(ConfigError, match="expected a mapping of names to sources"):
            prepare_corpus(sources, TOKENIZER, tmp_path / "out")


@pytest.mark.slow
def test_a_dataset_goes_to_disk(tmp_path):
    rows = Dataset.from_list(demo.texts(5_000))
    packed = prepare_dataset(rows, TOKENIZER, max_length=512, output_dir=tmp_path / "out", num_proc=2)
    in_memory = prepare_dataset(rows, TOKENIZER, max_length=512)
    assert sum(map(len, packed["input_ids"])) == sum(map(len, in_memory["input_ids"]))
    before = shard_times(tmp_path / "out")
    prepare_dataset(rows, TOKENIZER, max_length=512, output_dir=tmp_path / "out")
    assert shard_times(tmp_path / "out") == before
    with pytest.raises(ConfigError, match="output_dir needs files or a datasets.Dataset"):
        prepare_dataset(demo.texts(5), TOKENIZER, max_length=512, output_dir=tmp_path / "out")
    with pytest.raises(ConfigError, match="output_dir gets packed rows and a manifest"):
        prepare_dataset(rows, TOKENIZER, max_length=512, output_dir=tmp_path / "out", template_kwargs={"a": 1})


@pytest.mark.parametrize(("engine", "words"), [("spark", "engine is 'spark'"), ("ray", "needs Ray: pip install")])
def test_an_engine_that_is_not_there_leaves_the_folder_alone(prepared, monkeypatch, engine, words):
    """With `overwrite`, this deleted the finished corpus before it said that Ray is missing."""
    folder, sources = prepared
    before = shard_times(folder)
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(ConfigError, match=words):
        prepare_corpus(sources, TOKENIZER, folder, CorpusConfig(128, engine=engine), overwrite=True)
    assert shard_times(folder) == before and load_prepared(folder)


def test_overwrite_deletes_only_what_it_made(tmp_path):
    (tmp_path / "out" / "train").mkdir(parents=True)
    (tmp_path / "out" / "train" / "notes.txt").write_text("not ours")
    path = write_demo(tmp_path / "a.jsonl", 5)
    prepare_corpus({"a": path}, TOKENIZER, tmp_path / "out", CorpusConfig(**SMALL), overwrite=True)
    assert (tmp_path / "out" / "train" / "notes.txt").exists()


def test_a_finished_folder_stays_finished_for_those_who_read_it(tmp_path, monkeypatch):
    """The second process of a run finds everything there, while the first one reads the folder."""
    path = write_demo(tmp_path / "a.jsonl", 100)
    prepare_corpus({"a": path}, TOKENIZER, tmp_path / "out", CorpusConfig(**SMALL))
    written = []
    monkeypatch.setattr(Manifest, "write", lambda self, folder: written.append(self.complete))
    prepare_corpus({"a": path}, TOKENIZER, tmp_path / "out", CorpusConfig(**SMALL))
    assert written == [True]
