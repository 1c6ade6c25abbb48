"""Mixtures in trainers and loaders of two processes, all in one launch; each rank writes what it saw as JSON."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from datasets import Dataset
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from hf_objectives import (
    DataCollatorForAssistantOnlyLM,
    DataCollatorWithEosPacking,
    OrderedStreamCallback,
    PerplexityTrainer,
    PerplexityTrainingArguments,
    build_mixture,
)
from hf_objectives.distributed import leave_group, rank
from tests.support.hosts import ALONE, TOKENIZER, arguments
from tests.support.language_models import llama
from tests.support.ranks import run_ranks

BATCH, STEPS, SAVED = 2, 4, 2
OWN_BATCHES = {"accelerator_config": {"dispatch_batches": False}}


def mixture(packing: str | None = None):
    sources = {
        name: {
            "weight": weight,
            "dataset": Dataset.from_list([{"text": f"{name} {i} {'x' * (i % 9)}"} for i in range(90)]),
        }
        for name, weight in (("a", 2), ("b", 1))
    }
    return build_mixture({"sources": sources, "packing": packing, "max_length": 64}, tokenizer=TOKENIZER)


def collator(packing: str | None, width: int | None = None):
    if packing is None:
        return DataCollatorForAssistantOnlyLM(TOKENIZER, train_on="all", pad_to_multiple_of=width)
    return DataCollatorWithEosPacking(TOKENIZER, max_length=64, train_on="all", pad_to_multiple_of=width)


def watched(trainer) -> list:
    """The rows of each step."""
    seen, step = [], trainer.training_step

    def training_step(model, inputs, *rest):
        seen.append(inputs["input_ids"].tolist())
        return step(model, inputs, *rest)

    trainer.training_step = training_step
    return seen


def ours(folder, packing, **options):
    args = arguments(PerplexityTrainingArguments, folder, **options)
    return PerplexityTrainer(
        llama(), args, collator(packing), train_dataset=mixture(packing), processing_class=TOKENIZER
    )


def transformers(folder, packing, **options):
    made = mixture(packing)
    args = arguments(TrainingArguments, folder, ignore_data_skip=True, **OWN_BATCHES, **ALONE, **options)
    return Trainer(llama(), args, collator(packing), train_dataset=made, callbacks=[OrderedStreamCallback(made)])


def resumed(folder: Path) -> dict:
    """The rows of a run, and those of a run that goes on from its checkpoint."""
    found = {}
    cases = itertools.product((ours, transformers), ((None, 0), ("within", 2), ("across", 0)))
    for host, (packing, workers) in cases:
        name = f"{host.__name__} {packing}"
        options = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": SAVED, "dataloader_num_workers": workers}
        runs = []
        for checkpoint in (None, str(folder / name / f"checkpoint-{SAVED}")):
            trainer = host(folder / name, packing, per_device_train_batch_size=BATCH, **options)
            seen = watched(trainer)
            trainer.train(resume_from_checkpoint=checkpoint)
            losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
            runs.append({"rows": seen, "losses": losses})
        found[name] = runs
    return found


def handed_out(folder: Path) -> dict:
    """Batches that accelerate hands out: of one width, of several widths, and packed ones.

    An error is on the process that reads: the other one, which would wait for it, does not begin.
    """
    config = DataLoaderConfiguration(dispatch_batches=True)
    found: dict = {}
    for name, packing, width in (("one width", None, 64), ("several widths", None, None), ("packed", "within", 64)):
        loader = DataLoader(mixture(packing), BATCH, collate_fn=collator(packing, width))
        batches = Accelerator(cpu=True, dataloader_config=config).prepare(loader)
        if name == "one width":
            found[name] = [batch["input_ids"].tolist() for batch in itertools.islice(batches, 3)]
        elif rank() == 0:
            found[name] = failure(batches)
    return found


def failure(batches) -> str:
    try:
        list(itertools.islice(batches, 20))
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def datasets(folder: Path) -> dict:
    """The rows of a mixture as a dataset, in SFTTrainer, as it is and split by the user before."""
    found: dict = {}
    for name in ("whole", "split"):
        data = mixture().to_iterable_dataset()
        if name == "split":
            data = split_dataset_by_node(data, rank(), 2)
        options = {"max_steps": 2, "dataset_kwargs": {"skip_prepare_dataset": True}, "bf16": False, **ALONE}
        args = arguments(SFTConfig, folder, per_device_train_batch_size=BATCH, **options)
        trainer = SFTTrainer(llama(), args, collator(None), train_dataset=data, processing_class=TOKENIZER)
        loader = trainer.get_train_dataloader()
        if name == "whole":
            found[name] = [batch["input_ids"].tolist() for batch in itertools.islice(loader, 3)]
        else:
            found[name] = failure(loader)
    if rank() == 0:  # transformers' own Trainer hands out batches
        args = arguments(TrainingArguments, folder, **ALONE)
        trainer = Trainer(llama(), args, collator(None), train_dataset=data)
        found["split, handed out"] = failure(trainer.get_train_dataloader())
    return found


def outcomes(folder: Path) -> list[dict]:
    """Run all acts; what each rank wrote."""
    done = run_ranks(__file__, [str(folder)])
    assert done.returncode == 0, done.stderr[-6000:]
    return [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in (0, 1)]


def main() -> None:
    torch.set_num_threads(1)
    folder, found = Path(sys.argv[1]), {}
    for act in (resumed, handed_out, datasets):
        (folder / act.__name__).mkdir(exist_ok=True)
        found[act.__name__] = act(folder / act.__name__)
    (folder / f"rank_{rank()}.json").write_text(json.dumps(found))
    leave_group()


if __name__ == "__main__":
    main()
