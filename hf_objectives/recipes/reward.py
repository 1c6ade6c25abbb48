"""Train a reward model on preference pairs, and report how far it can be believed before and after.

    accelerate launch recipes/reward.py --config recipes/configs/reward_quickstart.yaml --model_name_or_path runs/quickstart
    accelerate launch recipes/reward.py --config recipes/configs/smollm2_reward.yaml \\
        --model_name_or_path path/or/id --dataset_name pairs.jsonl --output_dir runs/mine
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from datasets import Dataset
from trl import get_peft_config

from hf_objectives.diagnostics import plot_reward_model
from hf_objectives.errors import ConfigError
from hf_objectives.evaluation import Reliability
from hf_objectives.recipes.arguments import option
from hf_objectives.recipes.data import OVERLENGTH, RowArguments, Rows, set_template, split_rows
from hf_objectives.recipes.models import RecipeModel, load_scorer
from hf_objectives.recipes.run import Recipe, run
from hf_objectives.trainers import RewardModelConfig, RewardModelTrainer, encode_reward_row


@dataclass
class RewardData(RowArguments):
    """Where the pairs come from, and what becomes of an adapter."""

    chat_template: str | None = option(None, "A template, or the path of a .jinja file.")
    merge_adapter: bool = option(True, "Save a LoRA run as a whole model; false saves the adapter and its head.")
    packing, overlength, train_on = (
        False,
        OVERLENGTH,
        "the score at the last token of each answer",
    )  # what the plan says


class Reward(Recipe):
    """A reward model."""

    arguments = (RecipeModel, RewardData, RewardModelConfig)
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
        return RewardModelTrainer(
            model,
            args,
            train_dataset=encode(pairs, tokenizer, args),
            eval_dataset=encode(held_out, tokenizer, args),
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


def encode(rows: Rows, tokenizer: Any, args: RewardModelConfig) -> Dataset:
    """Pairs as ids. From Python values, so that no Arrow struct mixes the keys of two rows."""
    options: dict[str, Any] = {"max_length": args.max_length, "control_tokens": args.control_tokens}
    return Dataset.from_list(
        [encode_reward_row(tokenizer, row, source=row["source"], row_index=row["row"], **options) for row in rows]
    )


def as_json(diagram: Reliability) -> dict[str, list[float | None]]:
    """The bins of a reliability diagram as lists; None in an empty bin."""
    values = {name: getattr(diagram, name).tolist() for name in ("edges", "counts", "confidence", "accuracy")}
    return {name: [None if value != value else value for value in bins] for name, bins in values.items()}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the recipe; returns what `results.json` holds."""
    return run(Reward, argv)
