"""Arguments of PerplexityTrainer."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from accelerate.parallelism_config import ParallelismConfig
from transformers import TrainingArguments

from hf_objectives.errors import ConfigError
from hf_objectives.losses import IMPLEMENTATIONS
from hf_objectives.trainers.checkpoints import CheckpointSettings
from hf_objectives.types import check_one_of, option

#: Settings that would make numbers wrong or would be passed over: which values, and why and what to do.
_REFUSED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "z_loss": (lambda value: value < 0, "expected 0 or more"),
    "label_smoothing_factor": (lambda value: not 0 <= value < 1, "expected 0 or more, under 1"),
    "average_tokens_across_devices": (
        lambda value: not value,
        "off, it gives each rank's mean the same weight, so that the loss depends on how rows fall on ranks; leave it on",
    ),
    "label_names": (
        lambda value: [*(value or ["labels"])] != ["labels"],
        "loss and evaluation read the column 'labels' alone. Leave label_names out, and let the collator give labels under "
        "that name",
    ),
    "remove_unused_columns": (
        bool,
        "on, it takes columns away that collators read: messages, seq_lengths without which documents of a row see each "
        "other, loss_weights; leave it off",
    ),
    "include_for_metrics": (
        bool,
        "it is for compute_metrics, which needs logits that are never gathered; leave it out",
    ),
    "batch_eval_metrics": (bool, "it is for compute_metrics, which needs logits that are never gathered; leave it off"),
    "include_num_input_tokens_seen": (
        lambda value: value == "non_padding",
        "it takes every EOS of a packed row for padding where they are one token; num_tokens_seen is logged without it",
    ),
}


@dataclass
class PerplexityTrainingArguments(CheckpointSettings, TrainingArguments):
    """`transformers.TrainingArguments` with the settings that exact objectives need.

    Two defaults differ from the parent's: `remove_unused_columns=False`, because collators take whole rows, and
    `logging_nan_inf_filter=False`, because that filter logs an ordinary number in place of a NaN loss.

    Args:
        z_loss: weight of the squared log-partition (PaLM, arXiv 2204.02311, section 5); 0 for none.
        activation_offloading: TRL's, see `LongRows`.
        head_implementation: how head and loss are computed in one, see `fused_linear_cross_entropy`; None for the default.
        check_isolation: prove on the live model that no token sees those after it, nor another document where rows are
            packed (`probe_isolation`); before the first step and the first evaluation.
        cp: number of processes that share each row (context parallelism, with FSDP2); the rest are data parallel. It makes
            `parallelism_config`.
        tp: refused but for 1.

    Raises:
        ConfigError: a negative `z_loss`, sizes that the processes cannot be divided into, or a setting of the parent that
            would make numbers wrong, or would be passed over (`docs/compatibility.md` lists them).
    """

    z_loss: float = option(0.0, "Weight of the squared log-partition (PaLM: 1e-4); 0 for none.")
    head_implementation: str | None = option(None, "How head and loss are computed in one; default: the fastest one.")
    activation_offloading: bool = option(
        False, "Move activations to the host's memory until the backward pass needs them."
    )
    cp: int = option(1, "Processes that share each row (context parallelism); needs FSDP2.")
    tp: int = option(1, "Refused but for 1: tensor parallelism.")
    check_isolation: bool = option(True, "Prove on the live model that no token sees later ones or another document.")
    stop_on_non_finite: bool = option(True, "Stop all ranks before a step whose loss or gradient norm is not finite.")
    remove_unused_columns: bool = option(False, "Collators take whole rows; leave this off.")
    logging_nan_inf_filter: bool = option(False, "Would hide a loss that is not finite; leave this off.")

    def __post_init__(self) -> None:
        self._make_parallelism()
        super().__post_init__()
        for name, (is_bad, reason) in _REFUSED.items():
            if is_bad(value := getattr(self, name)):
                raise ConfigError(f"{name} is {value!r}; {reason}")
        if self.head_implementation is not None:
            check_one_of("head_implementation", self.head_implementation, IMPLEMENTATIONS)
        optimizer = str(getattr(self.optim, "value", self.optim))
        if self.stop_on_non_finite and ("lomo" in optimizer or "layerwise" in optimizer):
            raise ConfigError(
                f"optim is {optimizer!r}, which changes weights during the backward pass, so that no check can stop before "
                "that; take another optimizer, or set stop_on_non_finite=False"
            )

    def _make_parallelism(self) -> None:
        if self.tp != 1:
            raise ConfigError(
                f"tp is {self.tp}; expected 1: an evaluation would give the processes of one model different rows. Shard "
                "the model by FSDP2, and its rows by cp"
            )
        if self.cp == 1:
            return
        processes = int(os.environ.get("WORLD_SIZE", 1))  # no group is there yet
        if self.cp < 1 or processes % self.cp:
            raise ConfigError(f"cp is {self.cp} on {processes} processes; expected a divisor of their number")
        if self.parallelism_config is not None:
            raise ConfigError(f"cp is {self.cp} and parallelism_config is given too; expected one of the two")
        self.parallelism_config = ParallelismConfig(cp_size=self.cp, dp_shard_size=processes // self.cp)
