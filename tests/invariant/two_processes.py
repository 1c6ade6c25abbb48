"""Run by test_two_processes.py under torchrun: one act of PerplexityTrainer, its outcome written as JSON per rank."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent.parent / "trainers")]

from chat_corpus import byte_tokenizer
from test_causal_lm import arguments, chats
from test_collators import llama
from test_guards import poisoned, rows_with_a_bad_one

from hf_objectives.collators import DataCollatorForAssistantOnlyLM, DataCollatorWithEosPacking
from hf_objectives.distributed import leave_group, rank
from hf_objectives.errors import NonFiniteError
from hf_objectives.trainers import PerplexityTrainer

TOKENIZER = byte_tokenizer()


def evaluate(folder: Path) -> dict:
    """Losses for both collators and several batch sizes; 23 rows do not divide by two."""
    losses = {}
    for name, collator in (
        ("padded", DataCollatorForAssistantOnlyLM(TOKENIZER)),
        ("packed", DataCollatorWithEosPacking(TOKENIZER, max_length=200)),
    ):
        for batch_size in (1, 7):
            options = arguments(folder, per_device_eval_batch_size=batch_size)
            run = PerplexityTrainer(llama(), options, collator, eval_dataset=chats(), processing_class=TOKENIZER)
            losses[f"{name} {batch_size}"] = run.evaluate()
    return losses


def gradient(folder: Path) -> dict:
    """The gradient of one step of eight rows, four on each rank."""
    seen = {}

    class Stop(Exception):
        pass

    class Catch(PerplexityTrainer):
        def _get_grad_norm(self, model, grad_norm=None):
            seen.update({name.removeprefix("module."): p.grad.clone() for name, p in model.named_parameters()})
            raise Stop

    options = arguments(folder, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_grad_norm=0.0)
    try:
        Catch(llama(), options, None, train_dataset=chats(8), processing_class=TOKENIZER).train()
    except Stop:
        torch.save(seen, folder / f"gradient_{rank()}.pt")
    return {}


def not_finite(folder: Path) -> dict:
    """The bad row is on one rank; both must stop, with the weights they had."""
    model, before = poisoned(), {}
    options = arguments(folder, per_device_train_batch_size=1, max_steps=4, check_isolation=False)

    class Remember(PerplexityTrainer):
        def _get_grad_norm(self, model, grad_norm=None):
            before.update({name: p.detach().clone() for name, p in self.model.named_parameters()})
            return super()._get_grad_norm(model, grad_norm)

    run = Remember(model, options, None, train_dataset=rows_with_a_bad_one(), processing_class=TOKENIZER)
    try:
        run.train()
    except NonFiniteError as error:
        same = all(torch.equal(p, before[name]) for name, p in run.model.named_parameters())
        return {"stopped": str(error), "step": run.state.global_step + 1, "same": same}
    return {"stopped": ""}


def main() -> None:
    act, folder = sys.argv[1], Path(sys.argv[2])
    outcome = {"evaluate": evaluate, "gradient": gradient, "not_finite": not_finite}[act](folder)
    (folder / f"outcome_{rank()}.json").write_text(json.dumps(outcome))
    leave_group()


if __name__ == "__main__":
    main()
