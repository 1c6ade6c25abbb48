"""Workers: the same rows from every engine, and workers that die in the middle."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from datasets import Dataset

from hf_objectives import demo
from hf_objectives.errors import ConfigError, FormatError, WorkerError
from hf_objectives.preparation.config import CorpusConfig
from hf_objectives.preparation.corpus import load_prepared, prepare_corpus
from hf_objectives.preparation.dataset import prepare_dataset
from hf_objectives.preparation.work import Work
from hf_objectives.preparation.workers import run_local
from tests.support.corpora import SMALL, TOKENIZER, write_demo, write_texts

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Sources, and what one process makes of them."""
    folder = tmp_path_factory.mktemp("workers")
    sources = {"a": write_demo(folder / "a.jsonl", 400)}
    return sources, prepare_corpus(sources, TOKENIZER, folder / "out", CorpusConfig(**SMALL)), folder / "out"


class _Dying(Work):
    """Kills its own process at one segment, once."""

    def __call__(self, segment):
        flag = self.folder / "died"
        if segment.first > 100 and not flag.exists():
            flag.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(segment)


def test_workers_change_nothing(tmp_path, corpus):
    sources, alone, _ = corpus
    made = prepare_corpus(sources, TOKENIZER, tmp_path / "out", CorpusConfig(**{**SMALL, "num_proc": 3}))
    assert len(alone.shards) > 5 and made.shards == alone.shards and made.sources == alone.sources


def test_items_are_read_as_workers_need_them():
    read = []

    def items():
        for i in range(50):
            read.append(i)
            yield i

    results = run_local(abs, items(), 2)
    found = [next(results)]
    assert len(read) <= 6  # five in flight, and one result
    assert sorted(found + list(results)) == list(range(50))
    assert list(run_local(abs, [-3], None)) == [3]


@pytest.mark.slow
def test_a_killed_local_worker_is_an_error_and_a_second_run_goes_on(tmp_path, corpus, monkeypatch):
    sources, alone, _ = corpus
    monkeypatch.setattr("hf_objectives.preparation.corpus.Work", _Dying)
    config = CorpusConfig(**{**SMALL, "num_proc": 2})
    with pytest.raises(WorkerError, match="one of 2 worker processes died.*segments are finished and kept, run again"):
        prepare_corpus(sources, TOKENIZER, tmp_path / "out", config)
    assert prepare_corpus(sources, TOKENIZER, tmp_path / "out", config).shards == alone.shards


@pytest.fixture(scope="module")
def cluster(corpus):
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


@pytest.mark.long
@pytest.mark.slow
def test_ray_makes_the_same_shards_also_where_a_worker_is_killed(tmp_path, corpus, cluster, monkeypatch):
    sources, alone, folder = corpus
    monkeypatch.setattr("hf_objectives.preparation.corpus.Work", _Dying)
    made = prepare_corpus(
        sources, TOKENIZER, tmp_path / "ray", CorpusConfig(**{**SMALL, "num_proc": None}, engine="ray")
    )
    assert int((tmp_path / "ray" / "died").read_text()) != os.getpid()
    assert len(made.shards) > 5 and made.shards == alone.shards and made.sources == alone.sources
    assert list(load_prepared(tmp_path / "ray")) == list(load_prepared(folder))
    written = {path.name for path in (tmp_path / "ray" / "train").iterdir()}
    assert written == {Path(shard.path).name for shard in alone.shards}


def test_errors_come_back_from_ray_as_they_are(tmp_path, cluster):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n{"text": 3}\n')
    with pytest.raises(FormatError, match="source 'a', row 1: text is int"):
        prepare_corpus({"a": str(tmp_path / "a.jsonl")}, TOKENIZER, tmp_path / "out", CorpusConfig(64, engine="ray"))


@pytest.mark.slow
def test_a_dataset_through_ray(tmp_path, cluster):
    rows = Dataset.from_list(demo.texts(2_500))
    packed = prepare_dataset(rows, TOKENIZER, max_length=512, engine="ray", output_dir=tmp_path / "out")
    local = prepare_dataset(rows, TOKENIZER, max_length=512, num_proc=1, output_dir=tmp_path / "local")
    assert packed.to_list() == local.to_list()


def test_ray_needs_a_folder(tmp_path):
    path = write_texts(tmp_path / "a.jsonl", ["one"])
    with pytest.raises(ConfigError, match="engine='ray' writes shards; give it an output_dir"):
        prepare_dataset(path, TOKENIZER, max_length=64, engine="ray")
