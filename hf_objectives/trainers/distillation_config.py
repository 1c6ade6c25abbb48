"""Settings of the distillation trainer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers.trainer_utils import has_length
from trl import DistillationConfig

from hf_objectives.errors import ConfigError
from hf_objectives.labels import CONTROL_TOKENS, TRAIN_ON
from hf_objectives.trainers.checkpoints import CheckpointSettings
from hf_objectives.types import check_max_length, check_one_of, option


@dataclass
class PerplexityDistillationConfig(CheckpointSettings, DistillationConfig):
    """`trl.DistillationConfig` with the answers of the rows beside those of the student, and settings of what is measured.

    Args:
        lmbda: probability that a step is trained on the student's own answers; else on those of its rows (Agarwal et al.,
            arXiv 2306.13649, algorithm 1). 1 is TRL's: the student's own. 0 generates nothing, and takes texts as well.
        max_length, train_on, control_tokens: how the answers of rows are encoded, see `encode_row`.
        eval_lm_max_length, max_perplexity_increase: of `eval_lm_datasets`, see `LanguageModelEvaluation`.

    Raises:
        ConfigError: a setting out of its range, or `torch_compile`.
    """

    lmbda: float = option(
        1.0, "Share of steps on the student's own answers; the others are on the answers of the rows."
    )
    max_length: int | None = option(1024, "Tokens of a row with its answer; a turn that the end cuts is not trained.")
    train_on: str = option("assistant", "Turns of the rows that are trained: assistant, last_assistant or all.")
    control_tokens: str = option("plain", "How control tokens in texts of the rows are read.")
    eval_lm_max_length: int | None = option(1024, "Tokens of a row of eval_lm_datasets.")
    max_perplexity_increase: float | None = option(
        None, "Stop when perplexity on an eval_lm_dataset rose by more (0.1: by 10 %%)."
    )

    def __post_init__(self) -> None:
        for name in ("lmbda", "beta"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected 0 to 1")
        if not 0 < self.temperature < float("inf"):
            raise ConfigError(f"temperature is {self.temperature}; expected more than 0")
        if self.max_completion_length is None or self.max_completion_length < 1:
            raise ConfigError(f"max_completion_length is {self.max_completion_length}; expected 1 or more")
        super().__post_init__()
        check_max_length(self.max_length)
        check_one_of("train_on", self.train_on, TRAIN_ON)
        check_one_of("control_tokens", self.control_tokens, CONTROL_TOKENS)
        if not self.accelerator_config.even_batches:
            raise ConfigError("even_batches=False would give processes batches of different sizes; leave it on")
        if self.torch_compile:
            raise ConfigError("torch_compile makes all logits, which distillation never does; leave it off")

    def check_rows(self, rows: Any) -> None:
        """Refuse training rows that are fewer than a step takes: no step would be taken."""
        needed = self.train_batch_size * self.gradient_accumulation_steps * self.world_size
        if has_length(rows) and len(rows) < needed:
            raise ConfigError(
                f"train_dataset has {len(rows)} rows and a step takes {needed} (per_device_train_batch_size x "
                "gradient_accumulation_steps x processes); expected at least as many"
            )
