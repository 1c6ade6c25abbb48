"""One full step of a reward model (forward, backward, optimizer): packed pairs with shared prompts against TRL's padded ones.

    python benchmarks/reward_step.py --model FOLDER_OR_ID --pairs dpo_en_demo.json [--max-length 512] [--batch 4]

Ours with `padding_free=True` and TRL's RewardTrainer, measured as in `dpo_step.py`, whose options it has.
"""

from __future__ import annotations

import tempfile

from dpo_step import main, pairs_of, time_steps


def build(name: str, model, tokenizer, folder: str):
    """The contender's trainer."""
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    from hf_objectives import RewardModelConfig, RewardModelTrainer

    settings = {
        "use_cpu": True, "bf16": False, "report_to": "none", "learning_rate": 1e-6, "gradient_checkpointing": False,
    }  # fmt: skip
    rows = Dataset.from_list([{"chosen_ids": [500, 501], "rejected_ids": [500, 502]}] * 2)
    if name == "trl":
        args, kind = RewardConfig(folder, **settings), RewardTrainer
    else:
        args, kind = RewardModelConfig(folder, **settings, padding_free=True), RewardModelTrainer
    return kind(model, args, train_dataset=rows, processing_class=tokenizer)


def work(options) -> None:
    """One process of a reward model with a new head."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from trl.trainer.reward_trainer import DataCollatorForPreference

    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=1, dtype=torch.float32)
    pairs = [
        {f"{side}_ids": pair["prompt_ids"] + pair[f"{side}_ids"] for side in ("chosen", "rejected")}
        for pair in pairs_of(options, tokenizer)
    ]
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(options.worker, model, tokenizer, folder)
        time_steps(options, trainer, DataCollatorForPreference(model.config.pad_token_id), pairs)


if __name__ == "__main__":
    main(__doc__, work)
