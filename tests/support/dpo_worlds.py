"""Pairs, models and trainers for the tests of PerplexityDPOTrainer."""

from __future__ import annotations

import torch
from datasets import Dataset
from torch.nn.functional import log_softmax
from transformers import AutoModelForCausalLM
from trl import DPOConfig

from hf_objectives import DataCollatorForPreferencePairs, PerplexityDPOConfig, PerplexityDPOTrainer, demo
from tests.support.chat_corpus import PLAIN

TOKENIZER = demo.build_tokenizer()
PAIRS = [
    *demo.preferences(7),
    {
        "prompt": PLAIN[:1],
        "chosen": [PLAIN[1], *PLAIN[2:]],  # two turns of the assistant, with a question between
        "rejected": [{"role": "assistant", "content": "It is five, I think, or twenty 20."}],
        "answer": "",
    },
]
BATCH = DataCollatorForPreferencePairs(TOKENIZER)(PAIRS[4:])


def options(folder, **changed):
    defaults = {
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 3,
        "max_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
    }
    return {"output_dir": str(folder), **defaults, **changed}


def build(kind, model, folder, *, rows=None, tests=None, trainer=None, config=None, **changed):
    config = config or (PerplexityDPOConfig if kind is PerplexityDPOTrainer else DPOConfig)
    return kind(
        model,
        args=config(**options(folder, **changed)),
        train_dataset=Dataset.from_list(PAIRS) if rows is None else rows,
        eval_dataset=tests,
        processing_class=TOKENIZER,
        **(trainer or {}),
    )


def ours(model, folder, **named):
    return build(PerplexityDPOTrainer, model, folder, **named)


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def logps(model, pair, side):
    """Log-probabilities of the trained tokens of one answer, by a plain loop over the softmax in float64."""
    ids = pair["prompt_ids"] + pair[f"{side}_ids"]
    mask = [0] * len(pair["prompt_ids"]) + pair[f"{side}_mask"]
    with torch.no_grad():
        table = log_softmax(model(torch.tensor([ids])).logits[0].double(), dim=-1)
    return [float(table[at - 1, ids[at]]) for at in range(1, len(ids)) if mask[at]]
