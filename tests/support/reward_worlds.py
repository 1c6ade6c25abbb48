"""A reward model on a few pairs, for tests of one process and of two."""

from __future__ import annotations

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForSequenceClassification

from hf_objectives import RewardModelConfig, RewardModelTrainer, demo

TOKENIZER = demo.build_tokenizer()


def trainer(folder, **changed) -> RewardModelTrainer:
    """Two steps of plain gradient descent over sixteen pairs in their order, and seven held-out pairs after each."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForSequenceClassification(LlamaConfig(vocab_size=len(TOKENIZER) + 8, num_labels=1, **sizes))
    torch.nn.init.normal_(model.score.weight, std=0.5)  # so that rewards differ
    defaults = {
        "use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
        "gradient_checkpointing": False, "per_device_train_batch_size": 8, "per_device_eval_batch_size": 2,
        "max_steps": 2, "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "optim": "sgd",
        "learning_rate": 0.01, "train_sampling_strategy": "sequential",
    }  # fmt: skip
    pairs = demo.preferences(23)
    return RewardModelTrainer(
        model, RewardModelConfig(str(folder), **{**defaults, **changed}),
        train_dataset=Dataset.from_list(pairs[:16]), eval_dataset=Dataset.from_list(pairs[16:]), processing_class=TOKENIZER,
    )  # fmt: skip
