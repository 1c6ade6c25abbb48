"""What PPO's steps add up between two logs, over micro-batches and ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_objectives.distributed import sum_over_ranks
from hf_objectives.losses import Moments, PolicyLoss, ValueLoss, explained_variance

_NAMES = ("policy_loss", "value_loss", "entropy", "clip_fraction", "value_clip_fraction", "approx_kl")


class StepFigures:
    """Sums over tokens and moments of returns, divided once, when they are taken."""

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self._tokens = 0.0
        self._sums = torch.zeros(len(_NAMES), dtype=torch.float64)
        self._errors, self._returns = [Moments(0, 0, 0)], [Moments(0, 0, 0)]
        self.failures = 0

    def add(self, mask: Tensor, entropy: Tensor, policy: PolicyLoss, value: ValueLoss | None) -> None:
        """A micro-batch.

        Args:
            mask: [batch, length] of its tokens.
            entropy: scalar, summed over them, in nats.
            policy, value: their losses; None without a critic.
        """
        own = [entropy.new_zeros(())] * 2 if value is None else list(value)
        sums = [policy.loss, own[0], entropy, policy.clipped, own[1], policy.approx_kl]
        self._sums += torch.stack([one.detach().double() for one in sums]).cpu()
        self._tokens += float(mask.sum())

    def add_returns(self, returns: Tensor, values: Tensor, mask: Tensor) -> None:
        """The critic's errors on a micro-batch, all [batch, length]."""
        self._errors.append(Moments.of(returns - values, mask))
        self._returns.append(Moments.of(returns, mask))

    def take(self) -> dict[str, float]:
        """Means per token over all ranks since the last call; empty where there was no step, and no failure of a reward."""
        moments = [float(sum(part)) for parts in (self._errors, self._returns) for part in zip(*parts, strict=True)]
        sums = sum_over_ranks([self._tokens, float(self.failures), *moments, *self._sums.tolist()])
        self._clear()
        tokens, failures, errors, returns = sums[0], sums[1], Moments(*sums[2:5]), Moments(*sums[5:8])
        if not tokens and not failures:
            return {}
        figures = {name: value / tokens for name, value in zip(_NAMES, sums[8:], strict=True)} if tokens else {}
        if returns.number:
            figures["explained_variance"] = explained_variance(errors, returns)
        return {**figures, "rewards/failed": failures}
