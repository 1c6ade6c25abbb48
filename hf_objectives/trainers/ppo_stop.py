"""The end of PPO's steps over a batch of answers when the policy has gone too far from the one that gave them."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import TrainerCallback

from hf_objectives.distributed import sum_over_ranks


class KLStop(TrainerCallback):
    """Says which steps are left out: those over a batch of answers after one whose KL divergence was over the bound.

    The divergence is measured in a step's own forward passes, before it moves the policy. All ranks find the same.

    Args:
        bound: nats per token, the k3 estimate; None leaves out no step.
    """

    def __init__(self, bound: float | None) -> None:
        self.bound = bound
        self.is_over = False  # a checkpoint keeps it
        self._kl: Any = 0.0
        self._steps = self._skipped = 0

    def begin(self) -> None:
        """Begin with a new batch of answers."""
        self.is_over = False

    def add(self, nats: Tensor, step_tokens: Tensor) -> None:
        """Add a micro-batch: the estimate summed over its tokens, and the tokens of its whole step over all ranks."""
        if self.bound is not None:
            self._kl = self._kl + nats.detach() / step_tokens

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called after each step, one that was left out too."""
        if self.bound is None:
            return
        self._steps += 1
        if self.is_over:
            self._skipped += 1
        else:
            self.is_over = sum_over_ranks([float(self._kl)])[0] > self.bound
        self._kl = 0.0

    def take(self) -> dict[str, float]:
        """The share of steps left out since the last call, as `steps_skipped`; empty without a bound or a step."""
        steps, skipped = self._steps, self._skipped
        self._steps = self._skipped = 0
        return {"steps_skipped": skipped / steps} if steps else {}
