"""Settings of the DPO trainer: those of TRL, of what is measured, and of two cures."""

from __future__ import annotations

import dataclasses
from typing import Any

from trl import DPOConfig

from hf_objectives.errors import ConfigError
from hf_objectives.labels import CONTROL_TOKENS, TRAIN_ON
from hf_objectives.trainers.checkpoints import CheckpointSettings
from hf_objectives.types import check_one_of, option


@dataclasses.dataclass
class PerplexityDPOConfig(CheckpointSettings, DPOConfig):
    """`trl.DPOConfig` with settings of what is measured, and two cures for chosen answers that become less likely.

    Args:
        nll_weight: adds this many times the negative log-likelihood per chosen token to the loss (RPO, Pang et al., arXiv
            2404.19733, equations 1 and 2). The mean is over the tokens of the micro-batch; the paper divides each answer
            by its own length.
        dpop_lambda: penalty on a chosen answer that is less likely than under the reference (DPO-Positive, Pal et al., arXiv
            2402.13228, equation 3): −log σ(β (Δw − Δl − λ max(0, −Δw))), Δ the log ratio of an answer to the reference.
        warn_chosen_drop: nats per token since the start; None for no warning, which is given once.
        max_perplexity_increase: a share (0.1: ten per cent); None for no bound.
        train_on, control_tokens: how rows are encoded, see `encode_pair`.
        padding_free: TRL's setting, which TRL drops: pairs are packed, and each prompt is computed once; docs/alignment.md.

    Raises:
        ConfigError: a setting out of its range, or `dpop_lambda` with a loss that it is not defined for.
    """

    nll_weight: float = option(0.0, "Weight of the NLL of chosen answers (RPO); 0 for none.")
    dpop_lambda: float = option(0.0, "Penalty of DPO-Positive; 0 for none.")
    warn_chosen_drop: float | None = option(
        0.1, "Warn when chosen answers lose more nats per token than this while the margin grows."
    )
    max_perplexity_increase: float | None = option(
        None, "Stop when a dataset of eval_lm_datasets is this share over its start."
    )
    train_on: str = option("assistant", "Turns of the answers that are compared.")
    control_tokens: str = option("plain", "How control tokens in texts are read.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_of("train_on", self.train_on, TRAIN_ON)
        check_one_of("control_tokens", self.control_tokens, CONTROL_TOKENS)
        for name, at_least in (
            ("nll_weight", "0 or more"),
            ("dpop_lambda", "0 or more"),
            ("warn_chosen_drop", "0 or more, or None"),
        ):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ConfigError(f"{name} is {value}; expected {at_least}")
        if self.max_perplexity_increase is not None and not self.max_perplexity_increase > 0:
            raise ConfigError(
                f"max_perplexity_increase is {self.max_perplexity_increase}; expected more than 0, or None"
            )
        if self.dpop_lambda:
            self._check_dpop()

    def _check_dpop(self) -> None:
        settings: dict[str, tuple[Any, Any]] = {
            "loss_type": (self.loss_type, ["sigmoid"]),
            "f_divergence_type": (self.f_divergence_type, "reverse_kl"),
            "use_weighting": (self.use_weighting, False),
            "ld_alpha": (self.ld_alpha, None),
        }
        for name, (value, needed) in settings.items():
            if value != needed:
                raise ConfigError(
                    f"dpop_lambda changes the sigmoid loss of DPO alone: {name} is {value!r}; expected {needed!r}"
                )


#: Values of the settings where `args` are a `trl.DPOConfig`.
DEFAULTS = {field.name: field.default for field in dataclasses.fields(PerplexityDPOConfig)}
