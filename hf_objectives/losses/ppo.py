"""Proximal policy optimisation as functions of tensors: KL estimates, token rewards, advantages, clipped losses.

Tensors are [batch, length] over the tokens of answers, padded on the right; `mask` is 1 where a token was generated.
Losses and figures are sums, so that they add up over ranks. The caller divides them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

#: Estimates of KL(policy || reference) from log π - log π_ref of sampled tokens (Schulman 2020, "Approximating KL
#: divergence"). k1 is unbiased; k2 has less variance and a bias; k3 is unbiased and never negative.
KL_ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": lambda log_ratio: log_ratio,
    "k2": lambda log_ratio: log_ratio.square() / 2,
    "k3": lambda log_ratio: torch.expm1(-log_ratio) + log_ratio,
}


class Moments(NamedTuple):
    """Count, sum and sum of squares of values. The moments of two parts of the data add up to those of both."""

    number: float
    total: float
    squares: float

    @classmethod
    def of(cls, values: Tensor, mask: Tensor) -> Moments:
        """Take the moments of the values where the mask is set."""
        kept = values.detach()[mask.bool()].double()
        return cls(float(kept.numel()), float(kept.sum()), float(kept.square().sum()))

    @property
    def mean(self) -> float:
        """The mean of the values, 0 without values."""
        return self.total / self.number if self.number else 0.0

    @property
    def variance(self) -> float:
        """The population variance of the values, 0 without values."""
        return max(0.0, self.squares / self.number - self.mean**2) if self.number else 0.0


def whiten(values: Tensor, moments: Moments, *, shift_mean: bool = True) -> Tensor:
    """Scale values to variance 1, and with `shift_mean` to mean 0 (Huang et al. 2024, arXiv 2403.17031, section 7).

    Args:
        values: float, any shape.
        moments: the moments of the values of all ranks.
        shift_mean: whether to move the mean to 0.
    """
    scale = (moments.variance + 1e-8) ** -0.5
    centred = (values - moments.mean) * scale
    return centred if shift_mean else centred + moments.mean


def token_rewards(scores: Tensor, kl: Tensor | None, mask: Tensor, *, kl_coef: float) -> Tensor:
    """Compute the reward of each token: r_t = -β KL_t, plus the answer's score at its last generated token.

    This is equation 2 of Ziegler et al. (2019, arXiv 1909.08593), spread over tokens as in their section 2.

    Args:
        scores: float [batch], the score of each answer.
        kl: float [batch, length], the KL estimate at each token; None for no penalty.
        mask: [batch, length].
        kl_coef: β.

    Returns:
        float32 [batch, length], 0 where the mask is 0.
    """
    rewards = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device) if kl is None else -kl_coef * kl.float()
    rewards = rewards * mask
    lengths = mask.long().sum(dim=1)
    rows = lengths > 0
    rewards[rows, lengths[rows] - 1] += scores.float()[rows]
    return rewards


def generalized_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Estimate advantages and returns (GAE, Schulman et al. 2016, arXiv 1506.02438, equations 11, 12 and 16).

        δ_t = r_t + γ V_{t+1} - V_t,    A_t = δ_t + γ λ A_{t+1},    R_t = A_t + V_t

    V is 0 after the last generated token, where the answer ends. With V = 0 and λ = 1 an advantage is the discounted sum
    of the later rewards, as in REINFORCE (Williams 1992).

    Args:
        rewards, values, mask: [batch, length]; values of the states before each token was chosen.
        gamma: γ, the discount.
        lam: λ, from 0 (one step) to 1 (the whole return).

    Returns:
        Advantages and returns, float32 [batch, length], 0 where the mask is 0.
    """
    mask = mask.float()
    rewards, values = rewards.float() * mask, values.float() * mask
    advantages = torch.zeros_like(rewards)
    following = rewards.new_zeros(rewards.shape[0])
    next_value = torch.zeros_like(following)
    for t in range(rewards.shape[1] - 1, -1, -1):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        following = (delta + gamma * lam * following) * mask[:, t]
        advantages[:, t] = following
        next_value = values[:, t]
    return advantages, (advantages + values) * mask


class PolicyLoss(NamedTuple):
    """Sums over tokens, float32 scalars.

    The loss has a gradient. `clipped` is the number of tokens whose ratio is clipped, `approx_kl` the k3 estimate of
    KL(old || new), in nats.
    """

    loss: Tensor
    clipped: Tensor
    approx_kl: Tensor


def clipped_policy_loss(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor, *, clip_low: float, clip_high: float
) -> PolicyLoss:
    """Compute the clipped surrogate loss (Schulman et al. 2017, arXiv 1707.06347, equation 7, negated):

        -Σ_t min(ρ_t A_t, clip(ρ_t, 1 - ε_low, 1 + ε_high) A_t),    ρ_t = π(a_t) / π_old(a_t)

    Args:
        logps: float [batch, length], log-probability of each token under the policy, in nats.
        old_logps: the same under the policy that generated the token.
        advantages, mask: [batch, length].
        clip_low, clip_high: ε below and above 1.
    """
    mask = mask.float()
    log_ratio = (logps - old_logps) * mask
    ratio = log_ratio.exp()
    free = ratio * advantages
    bound = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    clipped = ((bound < free) * mask).sum().detach()
    approx_kl = (KL_ESTIMATORS["k3"](-log_ratio.detach()) * mask).sum()
    return PolicyLoss(-(torch.minimum(free, bound) * mask).sum(), clipped, approx_kl)


class ValueLoss(NamedTuple):
    """Sums over tokens, float32 scalars: the loss, with gradient, and the number of tokens whose value is clipped."""

    loss: Tensor
    clipped: Tensor


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, clip: float | None
) -> ValueLoss:
    """Compute half the squared error of the critic, with each value clipped to within `clip` of the old one:

        Σ_t 1/2 max((V - R)^2, (clip(V, V_old - ε, V_old + ε) - R)^2)

    It comes from OpenAI Baselines; see Huang et al. (2022), "The 37 implementation details of PPO", detail 9.

    Args:
        values, old_values, returns, mask: [batch, length].
        clip: ε; None for the plain squared error.
    """
    mask = mask.float()
    error = (values - returns).square()
    if clip is None:
        return ValueLoss((error * mask).sum() / 2, mask.new_zeros(()))
    kept = values.clamp(old_values - clip, old_values + clip)  # exactly V inside the range: nothing counts as clipped
    held = (kept - returns).square()
    return ValueLoss((torch.maximum(error, held) * mask).sum() / 2, ((held > error) * mask).sum().detach())


def explained_variance(errors: Moments, returns: Moments) -> float:
    """Compute 1 - Var(R - V) / Var(R): 1 for a perfect critic, 0 for a constant one, NaN where returns do not vary."""
    return 1 - errors.variance / returns.variance if returns.variance > 0 else float("nan")


@dataclass
class AdaptiveKL:
    """The coefficient β of the KL penalty, steered towards a target (Ziegler et al. 2019, arXiv 1909.08593, section 2.2):

        e = clip((KL - target) / target, -0.2, 0.2),    β ← β (1 + e min(n / horizon, 1))

    So one large batch of n answers changes β by a fifth at most, and β stays positive.

    Args:
        coef: the present β.
        target: nats per answer; None keeps β constant.
        horizon: number of answers over which β changes by a fifth at most.
    """

    coef: float
    target: float | None = None
    horizon: int = 10_000

    def update(self, kl: float, answers: int) -> float:
        """Update β after `answers` answers with a mean KL of `kl` nats, and return it."""
        if self.target is not None:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.coef *= 1 + error * min(answers / self.horizon, 1.0)
        return self.coef
