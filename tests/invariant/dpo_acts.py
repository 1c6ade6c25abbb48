"""Run by test_two_processes_dpo.py under torchrun: an evaluation and a short run of DPO, written as JSON per rank."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from datasets import Dataset

from hf_objectives.distributed import leave_group, rank
from tests.support.dpo_worlds import PAIRS, load, ours


def act(folder: Path) -> dict:
    """Metrics of seven pairs on two ranks, from rows and from a stream, and what training logs of eight."""
    rows = Dataset.from_list(PAIRS[:7])
    named = {"trainer": {"ref_model": load(folder / "other")}, "per_device_eval_batch_size": 2}
    found = {
        name: ours(load(folder / "model"), folder / name, tests=tests, **named).evaluate()
        for name, tests in (("rows", rows), ("stream", rows.to_iterable_dataset()))
    }
    run = ours(str(folder / "model"), folder / "run", max_steps=2, per_device_train_batch_size=2)
    run.train()
    found["logs"] = [log for log in run.state.log_history if "loss" in log]
    return found


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    outcome = act(folder)
    (folder / f"outcome_{rank()}.json").write_text(json.dumps(outcome))
    leave_group()
