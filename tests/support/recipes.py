"""What the tests of the recipes share: a user's small model, command lines, and launches of two processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_objectives import demo
from tests.support.ranks import run_ranks

ROOT = Path(__file__).parents[2]
TWO_PROCESSES = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
QUIET = {"logging_steps": 1, "use_cpu": "true", "report_to": "none", "disable_tqdm": "true"}


def save_small_model(folder: Path) -> tuple[Any, Any]:
    """Save a model and its tokenizer to `folder / "model"` and return both."""
    tokenizer = demo.build_tokenizer()
    tokenizer.save_pretrained(folder / "model")
    model = demo.build_model(tokenizer, hidden_size=32, num_layers=1)
    model.save_pretrained(folder / "model")
    return model, tokenizer


def write_rows(path: Path, rows: list[dict]) -> None:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def sharegpt(row: dict) -> dict:
    """A preference row as LLaMA-Factory's files have it."""
    (question,) = (message["content"] for message in row["prompt"])
    answers = {name: {"from": "gpt", "value": row[name][0]["content"]} for name in ("chosen", "rejected")}
    return {"conversations": [{"from": "human", "value": question}], **answers}


def few_built_in(monkeypatch: Any, rows: int) -> None:
    """At most so many rows and questions of the built-in corpus, and five questions a skill in an exam."""
    for name in ("texts", "chats", "preferences", "questions"):
        whole = getattr(demo, name)
        monkeypatch.setattr(demo, name, lambda n, *, of=whole, **given: of(min(n, rows), **given))
    exam = demo.exam
    monkeypatch.setattr(demo, "exam", lambda each, **given: exam(min(each, 5), **given))


def command_line(given: Mapping[str, Any], *more: str) -> list[str]:
    """Options as a command line, and what follows them."""
    return [*(str(word) for name, value in given.items() for word in (f"--{name}", value)), *more]


def run_two_processes(program: str | Path, words: list[str], *, torchrun: bool = False) -> subprocess.CompletedProcess:
    """Run a program on two processes, of torchrun or of `run_ranks`, which is faster; show its errors where it fails."""
    if torchrun:
        done = subprocess.run(
            [*TWO_PROCESSES, str(program), *words],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=300,
        )
    else:
        done = run_ranks(program, words)
    # Which process failed first stands above what the others say of it.
    errors = [line for line in done.stderr.splitlines() if "Error" in line]
    assert done.returncode == 0, "\n".join([*errors, done.stderr[-4000:]])
    return done
