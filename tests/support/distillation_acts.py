"""Distillation in several layouts: a program of one process of any number, and alone to compare with."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from torch.distributed.tensor import DTensor

from hf_objectives.distributed import leave_group, rank
from tests.support.distillation_worlds import CHATS, distillation, student

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


def call_it_a_group_of_gpus(args: Any) -> None:
    """Accelerate shards on accelerators alone, torch on a CPU as well; after the device was chosen."""
    assert args.device.type == "cpu"
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def on_shards(folder: Path) -> dict[str, list]:
    """What runs log whose student is whole on both processes, and sharded (FSDP2), evaluated before the first step too."""
    fsdp = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], "state_dict_type": "FULL_STATE_DICT"}
    sharded = {"settle": call_it_a_group_of_gpus, "fsdp": True, "fsdp_config": fsdp}
    found = {}
    for name, options in (("whole", {}), ("sharded", sharded)):
        for tied in (False, True):
            run = distillation(
                folder / name, ROWS[:8], model=student(tie_word_embeddings=tied), lmbda=0.5, max_steps=4, optim="sgd",
                learning_rate=0.1, eval_dataset=ROWS[:5], save_strategy="steps", save_steps=2, **options,
            )  # fmt: skip
            before = run.evaluate()["eval_loss"]
            run.train()
            assert any(isinstance(weight, DTensor) for weight in run.model.parameters()) == bool(options)
            losses = [log["loss"] for log in run.state.log_history if "loss" in log]
            found[f"{name} {tied}"] = [before, *losses, run.evaluate()["eval_loss"]]
    return found


if __name__ == "__main__":
    found = layouts(Path(sys.argv[1]))
    (Path(sys.argv[1]) / f"shards_{rank()}.json").write_text(json.dumps(on_shards(Path(sys.argv[1]) / "shards")))
    torch.save({key: run["weights"] for key, run in found.items()}, Path(sys.argv[1]) / f"weights_{rank()}.pt")
    (Path(sys.argv[1]) / f"logs_{rank()}.json").write_text(json.dumps({key: run["logs"] for key, run in found.items()}))
    leave_group()
