"""A folder is prepared once: the others wait on its lock, not in a collective, and learn of a failure."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from hf_objectives.preparation import lock
from hf_objectives.preparation.config import CorpusConfig
from hf_objectives.preparation.corpus import prepare_corpus
from hf_objectives.preparation.work import Work
from tests.support.corpora import SMALL, TOKENIZER, write_demo

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_others_wait_and_do_not_work_again(tmp_path, monkeypatch, caplog):
    path = write_demo(tmp_path / "a.jsonl", 30)
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.2)
    whole, calls = Work.__call__, []

    def slow(self, segment):
        calls.append(os.getpid())
        time.sleep(0.5)
        return whole(self, segment)

    monkeypatch.setattr(Work, "__call__", slow)
    config = CorpusConfig(**{**SMALL, "shard_bytes": 1 << 20})
    runs = [
        threading.Thread(target=prepare_corpus, args=({"a": path}, TOKENIZER, tmp_path / "out", config)) for _ in "ab"
    ]
    with caplog.at_level("WARNING"):
        for run in runs:
            run.start()
        for run in runs:
            run.join()
    assert len(calls) == 1
    assert any(
        "waiting for another process to prepare" in line and "0 of 1 segments" in line for line in caplog.messages
    )


# Two ranks whose group waits for two seconds prepare for four, and then fail together.
RANKS = """
import datetime, sys, time
import torch.distributed as dist
from hf_objectives.preparation.corpus import load_prepared, prepare_corpus
from hf_objectives.preparation.work import Work
from tests.support.chat_corpus import byte_tokenizer
good, bad, folder = sys.argv[1:]
whole, tokenizer = Work.__call__, byte_tokenizer()
def slow(self, segment):
    print("PREPARING", segment.source, flush=True)
    time.sleep(4 if segment.source == "good" else 1)
    return whole(self, segment)
Work.__call__ = slow
dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=2))
dist.barrier()
prepare_corpus({"good": good}, tokenizer, folder + "/good")
dist.barrier()
print("ROWS", len(load_prepared(folder + "/good")), flush=True)
try:
    prepare_corpus({"bad": bad}, tokenizer, folder + "/bad")
except Exception as error:
    print("FAILED", type(error).__name__, error, flush=True)
dist.destroy_process_group()
"""


@pytest.mark.long
@pytest.mark.distributed
def test_ranks_prepare_once_outlast_their_groups_timeout_and_learn_of_a_failure(tmp_path):
    good = write_demo(tmp_path / "a.jsonl", 30)
    (tmp_path / "bad.jsonl").write_text('{"text": "good"}\n{"text": 3}\n')
    (tmp_path / "ranks.py").write_text(RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, str(tmp_path / "ranks.py"), good, str(tmp_path / "bad.jsonl"), str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("PREPARING good") == 1 and done.stdout.count("ROWS 2") == 2
    assert done.stdout.count("PREPARING bad") == 1
    (first,) = [line for line in done.stdout.splitlines() if line.startswith("FAILED FormatError")]
    (second,) = [line for line in done.stdout.splitlines() if line.startswith("FAILED PreparedDataError")]
    assert "row 1: text is int" in first and "could not prepare" in second and "row 1: text is int" in second
