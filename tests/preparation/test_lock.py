"""A folder is prepared once: the others wait on its lock, not in a collective, and learn of a failure."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from hf_objectives import demo
from hf_objectives.preparation.config import CorpusSettings
from hf_objectives.preparation.corpus import prepare_corpus
from tests.preparation.test_corpus import SMALL, TOKENIZER, write_texts

ROOT = Path(__file__).parents[2]


def test_others_wait_and_do_not_work_again(tmp_path, monkeypatch, caplog):
    path = write_texts(tmp_path / "a.jsonl", [row["text"] for row in demo.texts(30)])
    from hf_objectives.preparation import lock
    from hf_objectives.preparation.work import Work

    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.2)
    whole, calls = Work.__call__, []

    def slow(self, segment):
        calls.append(os.getpid())
        time.sleep(0.5)
        return whole(self, segment)

    monkeypatch.setattr(Work, "__call__", slow)
    options = CorpusSettings(**{**SMALL, "shard_bytes": 1 << 20})
    runs = [
        threading.Thread(target=prepare_corpus, args=({"a": path}, TOKENIZER, tmp_path / "out", options)) for _ in "ab"
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


def test_who_waited_for_a_failure_fails_too(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n{"text": 3}\n')
    program = (
        "import sys, time\n"
        "from hf_objectives import demo\n"
        "from hf_objectives.corpus.build import prepare_corpus\n"
        "from hf_objectives.corpus.work import Work\n"
        "tokenizer, whole = demo.build_tokenizer(), Work.__call__\n"
        "def slow(self, segment):\n"
        "    print('began', flush=True); time.sleep(2); return whole(self, segment)\n"
        "Work.__call__ = slow\n"
        "print('ready', flush=True); input()\n"
        "prepare_corpus({'a': sys.argv[1]}, tokenizer, sys.argv[2])\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "a.jsonl"), str(tmp_path / "out")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    first, second = (subprocess.Popen(command, **pipes) for _ in "ab")
    for run in (first, second):
        assert run.stdout.readline() == "ready\n"
    first.stdin.write("\n")
    first.stdin.flush()
    assert first.stdout.readline() == "began\n"
    said, told = second.communicate("\n", timeout=60)
    _, failed = first.communicate(timeout=60)
    assert "row 1: text is int" in failed and "FormatError" in failed
    assert "began" not in said and "could not prepare" in told and "row 1: text is int" in told


RANKS = """
import datetime, sys, time
import torch.distributed as dist
from hf_objectives import demo
from hf_objectives.corpus.build import load_prepared, prepare_corpus
from hf_objectives.corpus.work import Work
whole, tokenizer = Work.__call__, demo.build_tokenizer()
def slow(self, segment):
    print("PREPARING", flush=True)
    time.sleep(10)
    return whole(self, segment)
Work.__call__ = slow
dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=3))
dist.barrier()
prepare_corpus({"a": sys.argv[1]}, tokenizer, sys.argv[2])
dist.barrier()
print("ROWS", len(load_prepared(sys.argv[2])), flush=True)
dist.destroy_process_group()
"""


@pytest.mark.distributed
def test_ten_seconds_of_preparation_under_a_group_that_waits_for_three(tmp_path):
    path = write_texts(tmp_path / "a.jsonl", [row["text"] for row in demo.texts(30)])
    (tmp_path / "ranks.py").write_text(RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, str(tmp_path / "ranks.py"), path, str(tmp_path / "out")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("PREPARING") == 1 and done.stdout.count("ROWS 1") == 2
