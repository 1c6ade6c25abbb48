"""Losses as functions of tensors: they return sums and counts, and know nothing of ranks or logs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_objectives import import_on_use

if TYPE_CHECKING:
    from hf_objectives.losses.linear_cross_entropy import (
        IMPLEMENTATIONS,  # ways to compute the loss below, by name
        check_targets,  # targets are entries of the head, or an error that names row and token
        fused_linear_cross_entropy,  # `next_token_loss` from hidden states and the head's weight, without all logits
    )
    from hf_objectives.losses.next_token import (
        SHIFTED,  # columns of what each position predicts
        LossSum,  # a loss before it is divided
        next_token_loss,  # summed cross-entropy, with label smoothing and z-loss
        next_token_targets,  # the label that each position predicts
        shifted_columns,  # label, weight and source of what each position predicts, of rows or of parts of rows
        token_nll,  # -log softmax(logits)[target] of each token
    )
    from hf_objectives.losses.ppo import (
        KL_ESTIMATORS,  # estimates of a KL divergence by name: k1, k2, k3
        AdaptiveKL,  # the coefficient of the KL penalty, steered towards a target
        Moments,  # count, sum and sum of squares; they add up over ranks
        PolicyLoss,  # what `clipped_policy_loss` returns
        ValueLoss,  # what `clipped_value_loss` returns
        clipped_policy_loss,  # the clipped surrogate objective of PPO
        clipped_value_loss,  # the clipped squared error of the critic
        explained_variance,  # the share of the returns' variance that the critic explains
        generalized_advantages,  # advantages and returns (GAE)
        token_rewards,  # KL penalty of each token, and the score on the last one
        whiten,  # scale values to variance 1
    )
    from hf_objectives.losses.token_scores import (
        TokenScores,  # log-probabilities of tokens, entropies and more
        scores_of_logits,  # the same from all logits
        token_log_probs,  # log-probabilities of tokens from hidden states and the head's weight, without all logits
    )
else:
    __getattr__, __dir__ = import_on_use(__name__, __file__)
