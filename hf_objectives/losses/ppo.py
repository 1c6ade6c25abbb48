"""Proximal policy optimisation as functions of tensors: KL estimates, token rewards, advantages, clipped losses.

Everything is [batch, length] over the tokens of answers, right-padded; `mask` is 1 where a token was generated. Losses are
sums, who divides by what is the caller's to say; what is only reported comes as sums too, so that ranks add up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

#: Estimates of KL(policy || reference) from the log-ratio log π - log π_ref of sampled tokens (Schulman 2020, "Approximating
#: KL divergence"): k1 is unbiased, k2 has less variance and a bias, k3 is unbiased and never negative.
KL_ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": lambda log_ratio: log_ratio,
    "k2": lambda log_ratio: log_ratio.square() / 2,
    "k3": lambda log_ratio: torch.expm1(-log_ratio) + log_ratio,
}


class Moments(NamedTuple):
    """Count, sum and sum of squares of values; moments of parts of the data add up.

    Attributes:
        number, total, squares: float64 scalars.
    """

    number: float
    total: float
    squares: float

    @classmethod
    def of(cls, values: Tensor, mask: Tensor) -> Moments:
        """Moments of the values where the mask is set."""
        kept = values.detach()[mask.bool()].double()
        return cls(float(kept.numel()), float(kept.sum()), float(kept.square().sum()))

    @property
    def mean(self) -> float:
        """Their mean, 0 of nothing."""
        return self.total / self.number if self.number else 0.0

    @property
    def variance(self) -> float:
        """Their population variance, 0 of nothing."""
        return max(0.0, self.squares / self.number - self.mean**2) if self.number else 0.0


def whiten(values: Tensor, moments: Moments, *, shift_mean: bool = True) -> Tensor:
    """Values scaled to variance 1, and to mean 0 unless `shift_mean` is off (Huang et al. 2024, arXiv 2403.17031, section 7).

    Args:
        values: float, any shape.
        moments: of the values of all ranks.
        shift_mean: whether to move the mean to 0.
    """
    scale = (moments.variance + 1e-8) ** -0.5
    centred = (values - moments.mean) * scale
    return centred if shift_mean else centred + moments.mean


def token_rewards(scores: Tensor, kl: Tensor | None, mask: Tensor, *, kl_coef: float) -> Tensor:
    """The reward of each token: r_t = -β KL_t, and the answer's score on its last generated token.

    Ziegler et al. (2019, arXiv 1909.08593), equation 2, spread over tokens as in section 2.

    Args:
        scores: float [batch], what the answers are worth.
        kl: float [batch, length], the estimate at each token; None for no penalty.
        mask: [batch, length].
        kl_coef: β.

    Returns:
        float32 [batch, length], 0 where the mask is.
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
    """Generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438, equations 11, 12 and 16).

        δ_t = r_t + γ V_{t+1} - V_t,    A_t = δ_t + γ λ A_{t+1},    R_t = A_t + V_t

    An answer ends with its last generated token: nothing follows it, so V is 0 there. With V = 0 and λ = 1 an advantage is
    the discounted sum of the rewards to come, which is REINFORCE (Williams 1992).

    Args:
        rewards, values, mask: [batch, length]; values at the state before each token was chosen.
        gamma: γ, the discount.
        lam: λ, from one-step (0) to the whole return (1).

    Returns:
        Advantages and returns, float32 [batch, length], 0 where the mask is.
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
    """Sums over tokens.

    Attributes:
        loss: float32 scalar, differentiable.
        clipped: float32 scalar, tokens whose ratio the clip holds back.
        approx_kl: float32 scalar, the k3 estimate of KL(old || new), in nats.
    """

    loss: Tensor
    clipped: Tensor
    approx_kl: Tensor


def clipped_policy_loss(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor, *, clip_low: float, clip_high: float
) -> PolicyLoss:
    """The clipped surrogate objective, to be minimised (Schulman et al. 2017, arXiv 1707.06347, equation 7):

        -Σ_t min(ρ_t A_t, clip(ρ_t, 1 - ε_low, 1 + ε_high) A_t),    ρ_t = π(a_t) / π_old(a_t)

    Args:
        logps: float [batch, length], log-probability of each token now, in nats.
        old_logps: the same when it was generated.
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
    """Sums over tokens.

    Attributes:
        loss: float32 scalar, differentiable.
        clipped: float32 scalar, tokens whose value the clip holds back.
    """

    loss: Tensor
    clipped: Tensor


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, clip: float | None
) -> ValueLoss:
    """Half the squared error of the critic, with the value kept within `clip` of the old one:

        Σ_t 1/2 max((V - R)^2, (clip(V, V_old - ε, V_old + ε) - R)^2)

    From the PPO of OpenAI Baselines; Huang et al. (2022), "The 37 implementation details of PPO", detail 9.

    Args:
        values, old_values, returns, mask: [batch, length].
        clip: ε; None for the plain squared error.
    """
    mask = mask.float()
    error = (values - returns).square()
    if clip is None:
        return ValueLoss((error * mask).sum() / 2, mask.new_zeros(()))
    kept = values.clamp(old_values - clip, old_values + clip)  # exactly V where it is within, so that none counts there
    held = (kept - returns).square()
    return ValueLoss((torch.maximum(error, held) * mask).sum() / 2, ((held > error) * mask).sum().detach())


def explained_variance(errors: Moments, returns: Moments) -> float:
    """1 - Var(R - V) / Var(R): 1 for a perfect critic, 0 for one that says the mean; NaN where returns do not vary.

    Args:
        errors: moments of R - V.
        returns: moments of R.
    """
    return 1 - errors.variance / returns.variance if returns.variance > 0 else float("nan")


@dataclass
class AdaptiveKL:
    """The coefficient β of the KL penalty, moved so that KL meets a target (Ziegler et al. 2019, arXiv 1909.08593, 2.2):

        e = clip((KL - target) / target, -0.2, 0.2),    β ← β (1 + e n / horizon)

    n counts as the horizon at most: one large batch moves β by no more than a fifth, and never below 0.

    Args:
        coef: β now.
        target: nats per answer; None keeps β as it is.
        horizon: answers over which β moves by a fifth at most.
    """

    coef: float
    target: float | None = None
    horizon: int = 10_000

    def update(self, kl: float, answers: int) -> float:
        """Move β by what `answers` answers with a mean KL of `kl` nats say; returns β."""
        if self.target is not None:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.coef *= 1 + error * min(answers / self.horizon, 1.0)
        return self.coef
