"""Train a reward model on preference pairs, and report how far it can be believed before and after.

    accelerate launch recipes/reward.py --config recipes/configs/reward_quickstart.yaml --model_name_or_path runs/quickstart
    accelerate launch recipes/reward.py --config recipes/configs/smollm2_reward.yaml \\
        --model_name_or_path path/or/id --dataset_name pairs.jsonl --output_dir runs/mine
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from trl import ModelConfig, get_peft_config

from hf_objectives.diagnostics import plot_reward_model
from hf_objectives.errors import ConfigError
from hf_objectives.evaluation import Reliability
from hf_objectives.recipes.data import RowArguments, encode_pairs, set_template, split_rows
from hf_objectives.recipes.models import load_scorer
from hf_objectives.recipes.run import Recipe
from hf_objectives.trainers import RewardModelConfig, RewardModelTrainer, encode_reward_row
from hf_objectives.types import option


@dataclass
class RewardData(RowArguments):
    """Where the pairs come from, and what becomes of an adapter."""

    chat_template: str | None = option(None, "A template, or the path of a .jinja file.")
    merge_adapter: bool = option(True, "Save a LoRA run as a whole model; false saves the adapter and its head.")
    train_on = "the score at the last token of each answer"  # what the plan says


class Reward(Recipe):
    """A reward model."""

    arguments = (ModelConfig, RewardData, RewardModelConfig)
    objective = "reward"
    figures: ClassVar[dict[str, str]] = {
        "eval_accuracy": "accuracy",
        "eval_margin": "margin (chosen less rejected)",
        "eval_loss": "loss (nats per pair)",
        "eval_expected_calibration_error": "expected calibration error",
        "eval_length_bias": "rank correlation of reward and length",
        "eval_longer_preferred": "the longer answer preferred",
        "eval_longer_accuracy": "accuracy of preferring the longer answer",
    }

    def build_trainer(self) -> RewardModelTrainer:
        """Load the model with its score head, and the pairs."""
        data, args = self.data, self.args
        model, tokenizer = load_scorer(self.model_config, use_cpu=self.use_cpu)
        set_template(tokenizer, data.chat_template)
        pairs, held_out = split_rows(data, seed=args.seed, built_in=(24_000, 400))
        if not held_out:
            raise ConfigError("eval_share is 0; a reward model that is not held against pairs says nothing")
        self.num_rows = self.results["num_pairs"] = len(pairs)
        self.diagrams: dict[str, Reliability] = {}
        self.model_config.lora_task_type = "SEQ_CLS"  # the score head is trained, and saved with the adapter
        options = {name: getattr(args, name) for name in ("max_length", "control_tokens")}
        train, evaluation = (
            encode_pairs(data, rows, encode_reward_row, tokenizer, options) for rows in (pairs, held_out)
        )
        return RewardModelTrainer(
            model,
            args,
            train_dataset=train,
            eval_dataset=evaluation,
            processing_class=tokenizer,
            peft_config=get_peft_config(self.model_config),
        )

    def evaluate(self, trainer: Any) -> dict[str, Any]:
        """Held-out figures and the calibration."""
        metrics = super().evaluate(trainer)
        self.diagrams["after" if self.diagrams else "before"] = trainer.pair_rewards.reliability()
        self.results["reliability"] = {name: as_json(diagram) for name, diagram in self.diagrams.items()}
        return metrics

    def save(self, trainer: Any) -> None:
        """Write the model; an adapter as part of the weights, so that any program can score with the folder."""
        inner = trainer.accelerator.unwrap_model(trainer.model)
        quantized = getattr(inner.config, "quantization_config", None)
        if self.data.merge_adapter and hasattr(inner, "merge_and_unload") and not quantized:
            trainer.model = trainer.model_wrapped = inner.merge_and_unload()
        super().save(trainer)

    def draw(self, trainer: Any, before: Mapping[str, Any], path: Path) -> Path:
        """Draw the curves and the reliability diagrams."""
        return plot_reward_model([{"step": 0, **before}, *trainer.state.log_history], self.diagrams, path)

    def print_figures(self, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
        """Print all figures, also those that these pairs have no value of."""
        super().print_figures(before, dict.fromkeys(self.figures) | dict(after))


def as_json(diagram: Reliability) -> dict[str, list[float | None]]:
    """The bins of a reliability diagram as lists; None in an empty bin."""
    values = {name: getattr(diagram, name).tolist() for name in ("edges", "counts", "confidence", "accuracy")}
    return {name: [None if value != value else value for value in bins] for name, bins in values.items()}


main = Reward.run
