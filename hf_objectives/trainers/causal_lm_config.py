"""Arguments of PerplexityTrainer."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import TrainingArguments

from hf_objectives.errors import ConfigError
from hf_objectives.types import option


@dataclass
class PerplexityTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` with the settings that exact objectives need.

    Two defaults differ from the parent's: `remove_unused_columns=False`, because collators take whole rows, and
    `logging_nan_inf_filter=False`, because that filter logs an ordinary number in place of a NaN loss.

    Args:
        z_loss: weight of the squared log-partition (PaLM, arXiv 2204.02311, section 5); 0 for none.
        check_isolation: see `probe_isolation`; before the first step and the first evaluation.

    Raises:
        ConfigError: a negative `z_loss`, or a setting of the parent that would make numbers wrong.
    """

    z_loss: float = option(0.0, "Weight of the squared log-partition (PaLM: 1e-4); 0 for none.")
    check_isolation: bool = option(True, "Prove on the live model that packed documents do not see each other.")
    stop_on_non_finite: bool = option(True, "Stop all ranks before a step whose loss or gradient norm is not finite.")
    remove_unused_columns: bool = option(False, "Collators take whole rows; leave this off.")
    logging_nan_inf_filter: bool = option(False, "Would hide a loss that is not finite; leave this off.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.z_loss < 0:
            raise ConfigError(f"z_loss is {self.z_loss}; expected 0 or more")
        if not 0 <= self.label_smoothing_factor < 1:
            raise ConfigError(f"label_smoothing_factor is {self.label_smoothing_factor}; expected 0 or more, under 1")
        if not self.average_tokens_across_devices:
            raise ConfigError(
                "average_tokens_across_devices=False gives each rank's mean the same weight, so that the loss depends on "
                "how rows fall on ranks; leave it on"
            )
        if [*(self.label_names or ["labels"])] != ["labels"]:
            raise ConfigError(
                f"label_names is {self.label_names}; loss and evaluation read the column 'labels' alone. Leave label_names "
                "out, and let the collator give labels under that name"
            )
