"""Short runs with one bad batch, for the tests of the live monitor."""

from __future__ import annotations

import json
import random

import torch
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from hf_objectives import DataCollatorForAssistantOnlyLM, PerplexityTrainer, PerplexityTrainingArguments, demo

BAD, STEPS = 30, 36  # the step whose batch is random tokens, and the last
SETTINGS = {
    **{
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 2e-3,
        "logging_steps": 1,
        "use_cpu": True,
    },
    **{"report_to": "none", "save_strategy": "no", "train_sampling_strategy": "sequential", "disable_tqdm": True},
}


def rows(tokenizer, *, accumulation=1):
    """Rows of one length; those of step BAD are random tokens."""
    draw = random.Random(0)
    made = []
    per_step = 2 * accumulation
    for i, row in enumerate(demo.texts(STEPS * per_step, skills=["sorting", "reversing"])):
        ids = (tokenizer(row["text"])["input_ids"] * 20)[:48]
        if i // per_step == BAD - 1:
            ids = [draw.randrange(100, 250) for _ in range(48)]
        made.append({"input_ids": ids, "labels": list(ids)})
    return made


def trainer_of(kind, folder, *, accumulation=1, **settings):
    torch.manual_seed(0)
    tokenizer = demo.build_tokenizer()
    model = demo.build_model(tokenizer)
    settings = {**SETTINGS, "gradient_accumulation_steps": accumulation, **settings}
    data = rows(tokenizer, accumulation=accumulation)
    if kind == "ours":
        named = [{**row, "source": "web", "row": i} for i, row in enumerate(data)]
        args = PerplexityTrainingArguments(str(folder), **settings)
        collator = DataCollatorForAssistantOnlyLM(tokenizer, train_on="all")
        return PerplexityTrainer(
            model, args, collator, train_dataset=Dataset.from_list(named), processing_class=tokenizer
        )
    if kind == "transformers":
        collator = DataCollatorForSeq2Seq(tokenizer)
        args = TrainingArguments(str(folder), **settings)
        return Trainer(model, args, collator, train_dataset=Dataset.from_list(data), processing_class=tokenizer)
    args = SFTConfig(str(folder), max_length=48, **settings)
    return SFTTrainer(model, args, train_dataset=Dataset.from_list(data), processing_class=tokenizer)


def events(folder):
    return {
        path.parent.name: json.loads(path.read_text()) for path in sorted((folder / "diagnostics").glob("*/event.json"))
    }
