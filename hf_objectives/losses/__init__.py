"""Losses as functions of tensors: sums, counts and gradients, no rank, no logging."""

from __future__ import annotations

from hf_objectives.losses.next_token import (
    next_token_loss,  # Summed cross-entropy, with label smoothing and z-loss when asked
    next_token_targets,  # What each position predicts: the label after it
    token_nll,  # Negative log-likelihood of each target, -log softmax(logits)[target], in nats
)
from hf_objectives.losses.ppo import (
    KL_ESTIMATORS,  # KL divergence"): k1 is unbiased, k2 has less variance and a bias, k3 is unbiased and never negat
    AdaptiveKL,  # The coefficient β of the KL penalty, moved so that KL meets a target (Ziegler et al. 2019, arXiv 19
    Moments,  # Count, sum and sum of squares of values; moments of parts of the data add up
    PolicyLoss,  # Sums over tokens
    ValueLoss,  # Sums over tokens
    clipped_policy_loss,  # The clipped surrogate objective, to be minimised (Schulman et al. 2017, arXiv 1707.06347,
    clipped_value_loss,  # Half the squared error of the critic, with the value kept within `clip` of the old one:
    explained_variance,  # 1 - Var(R - V) / Var(R): 1 for a perfect critic, 0 for one that says the mean; NaN where re
    generalized_advantages,  # Generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438, equations 11,
    token_rewards,  # The reward of each token: r_t = -β KL_t, and the answer's score on its last generated token
    whiten,  # Values scaled to variance 1, and to mean 0 unless `shift_mean` is off (Huang et al. 2024, arXiv 2403.17
)
