"""Distillation in several layouts: a program of one process of any number, and alone to compare with."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from hf_objectives.distributed import leave_group, rank
from tests.support.distillation_worlds import CHATS, distillation

PROCESSES = int(os.environ.get("WORLD_SIZE", 1))  # there is no group yet when the batch is chosen
#: Rows of a micro-batch on a process, and micro-batches of a step: eight rows a step in all of them.
LAYOUTS = {1: ((8, 1), (2, 4)), 2: ((4, 1), (2, 2))}.get(PROCESSES, ())
ROWS = [{"messages": [{"role": "user", "content": word}, *CHATS[i % 6][1:]]} for i, word in enumerate("abcdeabcdeab")]
ROWS += [{"messages": chat} for chat in CHATS]
RUNS: dict[str, dict[str, Any]] = {
    "own answers": {"lmbda": 1.0, "temperature": 0.8, "top_k": 6, "beta": 0.3},
    "both": {"lmbda": 0.5},
    "stream": {"lmbda": 0.5, "beta": 0.0},
}
TIMES = ("step_time", "runtime", "per_second", "flos")


def by_layout(folder: Path, name: str, size: int, accumulation: int, resume: str | None = None) -> dict[str, Any]:
    """A run of eight rows a step: what it logged, and its weights on this process."""
    rows = Dataset.from_list(ROWS)
    run = distillation(
        folder, rows.to_iterable_dataset() if name == "stream" else rows, per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulation, per_device_eval_batch_size=size, max_steps=6, optim="sgd",
        learning_rate=0.1, max_grad_norm=1.0, eval_dataset=ROWS[:7], eval_strategy="steps", eval_steps=3,
        save_strategy="steps", save_steps=4, **RUNS[name],
    )  # fmt: skip
    run.train(resume_from_checkpoint=resume)
    weights = {key: value.clone() for key, value in run.accelerator.unwrap_model(run.model).state_dict().items()}
    logs = [
        {key: value for key, value in log.items() if not any(word in key for word in TIMES)}
        for log in run.state.log_history
    ]
    return {"logs": logs, "weights": weights}


def layouts(folder: Path) -> dict[str, dict[str, Any]]:
    """All runs, by name and layout."""
    return {
        f"{name}, {size} x {times}": by_layout(folder / name / str(size), name, size, times)
        for name in RUNS
        for size, times in LAYOUTS
    }


if __name__ == "__main__":
    found = layouts(Path(sys.argv[1]))
    torch.save({key: run["weights"] for key, run in found.items()}, Path(sys.argv[1]) / f"weights_{rank()}.pt")
    (Path(sys.argv[1]) / f"logs_{rank()}.json").write_text(json.dumps({key: run["logs"] for key, run in found.items()}))
    leave_group()
