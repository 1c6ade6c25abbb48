"""Numbers of five tiny architectures, as a run makes them here: what `tests/invariant/curves` stores for each release.

python -m tests.support.recorded_curves      # writes the file of this release anew
"""

from __future__ import annotations

import copy
import json
import tempfile
import zlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

from hf_objectives import (
    DataCollatorForAssistantOnlyLM,
    PerplexityDPOConfig,
    PerplexityDPOTrainer,
    PerplexityTrainer,
    PerplexityTrainingArguments,
    RewardModelConfig,
    RewardModelTrainer,
    __version__,
    compute_perplexity,
    demo,
    prepare_dataset,
)

CURVES = Path(__file__).parents[1] / "invariant" / "curves"
PACKAGES = ("torch", "transformers", "trl", "datasets", "accelerate", "tokenizers")
TOKENIZER = demo.build_tokenizer()
CHATS = [{"messages": row["messages"]} for row in demo.chats(48)]
# Plain text: of a conversation TRL trains what the template writes behind the stop token, too.
PAIRS = [{"prompt": f"{i} and {i} is", "chosen": f" {2 * i}", "rejected": f" {i}{i}."} for i in range(1, 25)]
TEXTS = [row["text"] for row in demo.texts(12)]
_SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8,
    "num_key_value_heads": 2,
}  # fmt: skip
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": _SIZES,
    "qwen3": _SIZES,
    "gemma3_text": _SIZES,
    "mixtral": _SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}
SETTINGS: dict[str, Any] = {
    "use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1,
    "gradient_checkpointing": False, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 5,
    "train_sampling_strategy": "sequential", "learning_rate": 1e-3, "lr_scheduler_type": "constant",
}  # fmt: skip


def model(kind: str, *, scores: bool = False) -> Any:
    """A model from a fixed seed; a reward model with `scores`."""
    torch.manual_seed(0)
    special = {f"{name}_token_id": getattr(TOKENIZER, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    labels = {"num_labels": 1} if scores else {}
    config = AutoConfig.for_model(kind, vocab_size=len(TOKENIZER), **ARCHITECTURES[kind], **special, **labels)
    made = (AutoModelForSequenceClassification if scores else AutoModelForCausalLM).from_config(config)
    return made.to(torch.float32)


def losses(trainer: Any) -> list[float]:
    """Train, and give the loss of each step."""
    trainer.train()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def fine_tuning(kind: str, folder: str) -> PerplexityTrainer:
    """Ours, over conversations in their order."""
    return PerplexityTrainer(
        model(kind),
        PerplexityTrainingArguments(folder, max_steps=10, **SETTINGS),
        DataCollatorForAssistantOnlyLM(TOKENIZER),
        train_dataset=CHATS[:40],
        eval_dataset=CHATS[40:],
        processing_class=TOKENIZER,
    )


def preferences(kind: str, folder: str, *, theirs: bool = False) -> Any:
    """DPO, ours or TRL's."""
    trainer, config = (DPOTrainer, DPOConfig) if theirs else (PerplexityDPOTrainer, PerplexityDPOConfig)
    policy = model(kind)
    return trainer(
        policy,
        copy.deepcopy(policy),
        config(folder, max_steps=6, **SETTINGS),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=TOKENIZER,
    )


def rewards(kind: str, folder: str, *, theirs: bool = False) -> Any:
    """A reward model, ours or TRL's."""
    trainer, config = (RewardTrainer, RewardConfig) if theirs else (RewardModelTrainer, RewardModelConfig)
    return trainer(
        model(kind, scores=True),
        config(folder, max_steps=6, **SETTINGS),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=TOKENIZER,
    )


def recorded(kind: str) -> dict[str, Any]:
    """All numbers of an architecture."""
    with tempfile.TemporaryDirectory() as folder:
        tuned = fine_tuning(kind, folder)
        return {
            "fine-tuning": losses(tuned),
            "evaluation": tuned.evaluate()["eval_loss"],
            "perplexity": compute_perplexity(model(kind), TOKENIZER, TEXTS).perplexity,
            "dpo": losses(preferences(kind, folder)),
            "reward": losses(rewards(kind, folder)),
        }


def masks() -> dict[str, int]:
    """CRC-32 of ids and of labels of all conversations, padded and packed."""
    found = {}
    for name, packing in (("rows", False), ("packed", True)):
        rows = prepare_dataset(CHATS, TOKENIZER, max_length=256, packing=packing, num_proc=1)
        for column in ("input_ids", "labels"):
            found[f"{name} {column}"] = zlib.crc32(json.dumps(list(map(list, rows[column]))).encode())
    return found


def main() -> None:
    """Write the file of this release."""
    content = {
        "versions": {"hf_objectives": __version__} | {name: version(name) for name in PACKAGES},
        "masks": masks(),
        "curves": {kind: recorded(kind) for kind in ARCHITECTURES},
    }
    CURVES.mkdir(exist_ok=True)
    (CURVES / f"{__version__}.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
