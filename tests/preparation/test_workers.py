"""The engines: the same rows from each, and workers that die in the middle."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from datasets import Dataset, disable_progress_bars

from hf_objectives import demo
from hf_objectives.errors import ConfigError, FormatError, WorkerError
from hf_objectives.preparation.config import CorpusSettings
from hf_objectives.preparation.corpus import load_prepared, prepare_corpus
from hf_objectives.preparation.dataset import prepare_dataset
from hf_objectives.preparation.work import Work
from tests.support.chat_corpus import byte_tokenizer

disable_progress_bars()
ROOT = Path(__file__).parents[2]
TOKENIZER = byte_tokenizer()
SMALL = {"max_length": 64, "shard_bytes": 2_000}


def corpus(folder: Path, n: int = 400) -> dict[str, str]:
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in demo.texts(n)))
    return {"a": str(folder / "a.jsonl")}


class _Dying(Work):
    """Kills its own process at one segment, once."""

    def __call__(self, segment):
        flag = self.folder / "died"
        if segment.first > 100 and not flag.exists():
            flag.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(segment)


def test_a_killed_local_worker_is_an_error_and_a_second_run_goes_on(tmp_path, monkeypatch):
    sources = corpus(tmp_path)
    whole = prepare_corpus(sources, TOKENIZER, tmp_path / "whole", CorpusSettings(**SMALL))
    monkeypatch.setattr("hf_objectives.preparation.corpus.Work", _Dying)
    settings = CorpusSettings(num_proc=2, **SMALL)
    with pytest.raises(WorkerError, match="one of 2 worker processes died.*Run again: finished shards are kept"):
        prepare_corpus(sources, TOKENIZER, tmp_path / "out", settings)
    assert prepare_corpus(sources, TOKENIZER, tmp_path / "out", settings).shards == whole.shards


@pytest.fixture(scope="module")
def cluster():
    """A local Ray cluster of two workers, which import this file's classes. While it is up nothing here forks: a process
    that Ray's threads run in does not survive that."""
    ray = pytest.importorskip("ray", reason="Ray is an extra: pip install 'hf-objectives[ray]'")
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}},
    )
    yield ray
    ray.shutdown()


def test_ray_makes_the_same_shards(tmp_path, cluster):
    sources = corpus(tmp_path)
    local = prepare_corpus(sources, TOKENIZER, tmp_path / "local", CorpusSettings(num_proc=1, **SMALL))
    made = prepare_corpus(sources, TOKENIZER, tmp_path / "ray", CorpusSettings(engine="ray", **SMALL))
    assert len(made.shards) > 5 and made.shards == local.shards and made.sources == local.sources
    assert list(load_prepared(tmp_path / "ray")) == list(load_prepared(tmp_path / "local"))


def test_a_killed_ray_worker_loses_nothing(tmp_path, cluster, monkeypatch):
    sources = corpus(tmp_path)
    local = prepare_corpus(sources, TOKENIZER, tmp_path / "local", CorpusSettings(num_proc=1, **SMALL))
    monkeypatch.setattr("hf_objectives.preparation.corpus.Work", _Dying)
    made = prepare_corpus(sources, TOKENIZER, tmp_path / "ray", CorpusSettings(engine="ray", **SMALL))
    assert int((tmp_path / "ray" / "died").read_text()) != os.getpid()
    assert made.shards == local.shards and made.sources == local.sources
    written = {path.name for path in (tmp_path / "ray" / "train").iterdir()}
    assert written == {Path(shard.path).name for shard in local.shards}


def test_errors_come_back_from_ray_as_they_are(tmp_path, cluster):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n{"text": 3}\n')
    with pytest.raises(FormatError, match="source 'a', row 1: text is int"):
        prepare_corpus(
            {"a": str(tmp_path / "a.jsonl")}, TOKENIZER, tmp_path / "out", CorpusSettings(engine="ray", **SMALL)
        )


def test_a_dataset_through_ray(tmp_path, cluster):
    rows = Dataset.from_list(demo.texts(5_000))
    packed = prepare_dataset(rows, TOKENIZER, max_length=512, engine="ray", output_dir=tmp_path / "out")
    local = prepare_dataset(rows, TOKENIZER, max_length=512, num_proc=1, output_dir=tmp_path / "local")
    assert packed.to_list() == local.to_list()


def test_ray_needs_a_folder():
    with pytest.raises(ConfigError, match="engine='ray' writes shards; give it an output_dir"):
        prepare_dataset(demo.texts(5), TOKENIZER, max_length=64, engine="ray")
