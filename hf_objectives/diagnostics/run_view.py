"""A run as the rules of `diagnose` look at it: what several rules need, computed once."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import NamedTuple

import numpy as np

from hf_objectives.diagnostics.curves import Curves, Series
from hf_objectives.diagnostics.robust import Excursion, Values, excursions, noise
from hf_objectives.inspection import Severity

ENOUGH = 20  #: points of the loss; with fewer, a trend is not told from noise
SIZABLE = 0.1  #: of the loss: a smaller change is worth knowing, no more
LOW = 0.1  #: nats per token, a perplexity of 1.1
_NO_GRADIENT = 7  # logged norms of exactly 0
_ZEROS = 3  # logged losses of exactly 0 in a row
_PREFERENCE = ("rewards/chosen", "rewards/margins", "rewards/accuracies", "margin", "accuracy", "f1")
_POLICY = ("kl", "reward", "completions/mean_length", "policy_loss")
_DISTILLATION = ("on_policy", "divergence", "on_policy_divergence")


class Sign(NamedTuple):
    """What a rule saw: how bad it is, the first and the last step, and the figures in words."""

    severity: Severity
    step: int
    last_step: int
    evidence: str


class RunView:
    """The curves of a run, without values that are not finite, and what kind of a run it is."""

    def __init__(self, curves: Curves) -> None:
        self.curves = curves
        self._finite: dict[str, Series] = {}

    def __contains__(self, key: str) -> bool:
        return key in self.curves

    def __getitem__(self, key: str) -> Series:
        """The finite points of a curve; none where the log has no such curve."""
        if key not in self._finite:
            steps, values = self.curves.get(key)
            finite = np.isfinite(values)
            self._finite[key] = Series(steps[finite], values[finite])
        return self._finite[key]

    @cached_property
    def is_policy(self) -> bool:
        """Whether `loss` is that of a policy gradient. Its value says nothing about how good the model is."""
        # KTO logs a kl as well, and distillation its answers.
        others = "rewards/chosen" in self or self._logs(_DISTILLATION)
        return any(key in self for key in _POLICY) and not others

    @cached_property
    def is_language_model(self) -> bool:
        """Whether `loss` is nats per token: not of preferences, reinforcement learning, distillation or classes."""
        return not self._logs((*_PREFERENCE, *_POLICY, *_DISTILLATION))

    def _logs(self, keys: Iterable[str]) -> bool:
        return any(key in self or f"eval_{key}" in self for key in keys)

    @cached_property
    def evaluations(self) -> list[str]:
        """Names of the evaluation losses: eval_loss, or one for each evaluation set."""
        return [key for key in sorted(self.curves.series) if key.startswith("eval_") and key.endswith("loss")]

    @cached_property
    def noise(self) -> float:
        """Standard deviation of the noise of the training loss."""
        return noise(self["loss"].values)

    @cached_property
    def rises(self) -> list[Excursion]:
        """Excursions of the training loss."""
        return excursions(self["loss"].values)

    @cached_property
    def no_gradient(self) -> bool:
        """Whether every logged gradient norm is exactly 0 while the loss is not.

        PPO logs the norm of the policy, which is at rest while its critic warms up.
        """
        norms = self["grad_norm"].values
        if "value_loss" in self:
            return False
        return bool(len(norms) >= _NO_GRADIENT and not norms.any() and self["loss"].values.any())

    @cached_property
    def zero_from(self) -> int | None:
        """Index from which on every logged loss is exactly 0; None where the last ones are not."""
        values = self.curves.get("loss").values
        first = int(np.append(0, np.flatnonzero(values) + 1)[-1])
        return first if len(values) - first >= _ZEROS and not self.is_policy else None

    def epochs_at(self, steps: np.ndarray) -> Values | None:
        """Epochs done at each step; None where the log does not say."""
        logged = self["epoch"]
        return np.interp(steps, *logged) if len(logged.steps) else None
