"""Acts of `PerplexityTrainer` under context parallelism, on four processes: two groups of two, each with rows of its own."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from hf_objectives.collators import DataCollatorForAssistantOnlyLM
from hf_objectives.distributed import leave_group, rank
from hf_objectives.errors import NonFiniteError
from hf_objectives.labels import encode_row
from hf_objectives.trainers import PerplexityTrainer
from tests.support import ring_attention
from tests.support.language_models import TOKENIZER, chats, llama, poisoned, rows_with_a_bad_one
from tests.support.mixtures import mixture
from tests.support.ranks import run_ranks
from tests.support.two_processes import on_shards

PROCESSES = 4


def weighed() -> list[dict]:
    """Eight encoded chats, whose trained tokens weigh 0, 1 and 2 in turn."""
    rows = []
    for row in chats(8):
        encoded = encode_row(TOKENIZER, row)
        weights = [float(i % 3) for i in range(len(encoded["labels"]))]
        rows.append({**encoded, "loss_weights": weights, "source": row["source"]})
    return rows


def run_of(folder: Path, rows, model=None, collator=None, **options) -> PerplexityTrainer:
    """A trainer of eight rows a step: two of a process, two micro-batches, two groups."""
    options = {"gradient_accumulation_steps": 2, "max_steps": 1, "learning_rate": 0.0, "max_grad_norm": 0.0, **options}
    args = on_shards(folder, cp=2, train_sampling_strategy="sequential", **options)
    return PerplexityTrainer(
        model or llama(), args, collator, train_dataset=rows, eval_dataset=chats(), processing_class=TOKENIZER
    )


def whole(value: torch.Tensor) -> torch.Tensor:
    """All of a tensor that is sharded."""
    return (value.full_tensor() if isinstance(value, DTensor) else value).clone()


def step(folder: Path) -> dict:
    """The gradient of a step of eight chats, plain and weighed, what it logs, and the stop tokens that it saw."""
    logs = {}
    for name, rows in (("plain", chats(8)), ("weighed", weighed())):
        seen = {}

        class Catch(PerplexityTrainer):
            def _get_grad_norm(self, model, grad_norm=None, seen=seen):
                seen.update({name: whole(p.grad) for name, p in model.named_parameters()})
                return super()._get_grad_norm(model, grad_norm)

        run = run_of(folder, rows)
        run.__class__ = Catch
        run.train()
        torch.save(seen, folder / f"{name}_{rank()}.pt")
        logs[name] = {**run.state.log_history[0], "stops": run.trained_stop_ids()}
    return logs


def evaluate(folder: Path) -> dict:
    """23 rows, before a step of learning rate 0 and after it."""
    run = run_of(folder, chats(8), per_device_eval_batch_size=3)
    before = run.evaluate()
    run.train()
    return {"before": before, "after": run.evaluate()}


class Seen:
    """Our collator; remembers the rows."""

    def __init__(self) -> None:
        self.rows: list[tuple] = []
        self._collate = DataCollatorForAssistantOnlyLM(TOKENIZER, train_on="all", pad_to_multiple_of=4)

    def __call__(self, rows):
        self.rows += [(row["source"], int(row["n"])) for row in rows]
        return self._collate([{**row, "input_ids": [i % 250 + 2 for i in row["input_ids"]]} for row in rows])


def stream(folder: Path) -> dict:
    """Three steps of a mixture; the rows that this process collated."""
    collate = Seen()
    run = run_of(folder, mixture(), collator=collate, max_steps=3)
    run.train()
    return {"rows": collate.rows, "taken": run.rows_taken, "batch_rows": run.train_dataset.batch_rows}


def not_finite(folder: Path) -> dict:
    """One of four steps has a bad row."""
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "max_steps": 4}
    run = run_of(folder, rows_with_a_bad_one(), model=poisoned(), **options)
    try:
        run.train()
    except NonFiniteError as error:
        return {"stopped": str(error), "step": run.state.global_step + 1}
    return {"stopped": ""}


ACTS = (step, evaluate, stream, not_finite)


def start(folder: Path) -> dict[str, list[dict]]:
    """Run all acts; the outcomes of each on all ranks."""
    done = run_ranks(__file__, [str(folder)], PROCESSES)
    assert done.returncode == 0, done.stderr[-6000:]
    return {
        act.__name__: [json.loads((folder / act.__name__ / f"outcome_{i}.json").read_text()) for i in range(PROCESSES)]
        for act in ACTS
    }


def main() -> None:
    ring_attention.on_cpu()
    for act in ACTS:
        folder = Path(sys.argv[1]) / act.__name__
        folder.mkdir(exist_ok=True)
        outcome = act(folder)
        (folder / f"outcome_{rank()}.json").write_text(json.dumps(outcome))
    leave_group()


if __name__ == "__main__":
    main()
