"""Train a reward model on preference pairs, and report how far it can be believed before and after.

    accelerate launch recipes/reward.py --config reward_quickstart --model_name_or_path runs/quickstart
    accelerate launch recipes/reward.py --config smollm2_reward \\
        --model_name_or_path path/or/id --dataset_name pairs.jsonl --output_dir runs/mine
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from trl import get_peft_config

from hf_objectives.diagnostics import plot_reward_model
from hf_objectives.errors import ConfigError
from hf_objectives.evaluation import Reliability
from hf_objectives.recipes.data_arguments import RowArguments
from hf_objectives.recipes.models import RecipeModel, load_scorer
from hf_objectives.recipes.pairs import PairRecipe
from hf_objectives.trainers import RewardModelConfig, RewardModelTrainer, encode_reward_row
from hf_objectives.types import option


@dataclass
class RewardData(RowArguments):
    """Where the pairs come from, and what becomes of an adapter."""

    chat_template: str | None = option(None, "A template, or the path of a .jinja file.")
    merge_adapter: bool = option(True, "Save a LoRA run as a whole model; false saves the adapter and its head.")
    train_on = "the score at the last token of each answer"  # what the plan says


class Reward(PairRecipe):
    """A reward model."""

    arguments = (RecipeModel, RewardData, RewardModelConfig)
    objective = "reward"
    # TRL's `num_tokens` are those that were trained until then.
    of_model_alone = r"eval_(?!runtime|model_preparation_time|num_tokens|\w+_per_second).+"
    encode_row = encode_reward_row
    encoding_options = ("max_length", "control_tokens")
    built_in = (16_000, 500)
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
        model, tokenizer = load_scorer(self.model_config, **self.loading)
        self.load_rows(tokenizer)
        if not self.held_out:
            raise ConfigError("eval_share is 0; a reward model that is not held against pairs says nothing")
        self.diagrams: dict[str, Reliability] = {}
        self.model_config.lora_task_type = "SEQ_CLS"  # the score head is trained, and saved with the adapter
        return RewardModelTrainer(
            model,
            self.args,
            train_dataset=self.train_rows,
            eval_dataset=self.encode(self.held_out, tokenizer),
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
