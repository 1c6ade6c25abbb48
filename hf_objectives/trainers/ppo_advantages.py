"""From scores, KL and values to the advantages and returns of each token, whitened over all ranks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from hf_objectives.losses import Moments, generalized_advantages, token_rewards, whiten
from hf_objectives.trainers.metrics import over_ranks


class Advantages(NamedTuple):
    """Float32 [batch, length], 0 outside the mask: advantages as they are trained on, before whitening, and returns."""

    trained: Tensor
    plain: Tensor
    returns: Tensor


@dataclass
class AdvantageEstimator:
    """Token rewards, generalised advantage estimation and whitening, as `PPOConfig` sets them.

    Args:
        gamma, lam: see `generalized_advantages`.
        whiten_rewards: scale token rewards to variance 1; their mean stays. An evaluation has the scale of the last batch
            that was trained on, which is that of the critic's values.
        whiten_advantages: scale advantages to mean 0 and variance 1.
        reward_moments: those of the last batch that was trained on, empty before; a checkpoint keeps them.
    """

    gamma: float
    lam: float
    whiten_rewards: bool
    whiten_advantages: bool
    reward_moments: list[float] = field(default_factory=list)

    def of(
        self, scores: Tensor, kl: Tensor | None, values: Tensor, mask: Tensor, *, kl_coef: float, trains: bool
    ) -> Advantages:
        """Compute the advantages of this rank's answers; all ranks call it.

        Args:
            scores: float [batch].
            kl: float [batch, length], the KL estimate of each token; None for no penalty.
            values, mask: [batch, length].
            kl_coef: weight of the penalty.
            trains: whether the answers are trained on; False for those of an evaluation.
        """
        rewards = token_rewards(scores, kl, mask, kl_coef=kl_coef)
        if self.whiten_rewards:
            if trains:
                self.reward_moments = [*over_ranks(Moments.of(rewards, mask))]
            if self.reward_moments:
                rewards = whiten(rewards, Moments(*self.reward_moments), shift_mean=False) * mask
        plain, returns = generalized_advantages(rewards, values, mask, gamma=self.gamma, lam=self.lam)
        if not self.whiten_advantages:
            return Advantages(plain, plain, returns)
        return Advantages(whiten(plain, over_ranks(Moments.of(plain, mask))) * mask, plain, returns)
