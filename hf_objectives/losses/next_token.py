"""The next-token loss. It returns sums, and the caller divides them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hf_objectives.types import IGNORE_INDEX


class LossSum(NamedTuple):
    """A loss before it is divided.

    Attributes:
        loss: float32 scalar, the sum over targets of what is minimised; with gradient.
        nll: float32 scalar, the sum of negative log-likelihoods in nats; detached.
        weight: float32 scalar, the sum of the targets' weights; without weights, the number of targets.
        token_nll: float32 [tokens], the negative log-likelihood of each target; detached.
    """

    loss: Tensor
    nll: Tensor
    weight: Tensor
    token_nll: Tensor


def next_token_targets(labels: Tensor) -> Tensor:
    """Shift labels by one, so that each position holds the label that it predicts.

    Args:
        labels: int64 [batch, length], unshifted, -100 where a token is not trained.

    Returns:
        int64 [batch, length], -100 at the last position. No position predicts the first label.
    """
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Compute the negative log-likelihood of each target, -log softmax(logits)[target], in nats.

    It is the log-partition minus the target's logit in float32. The sum differs from float64 by 2e-8 of itself on the
    same logits; that of `cross_entropy` differs by 2e-6.

    Args:
        logits: [tokens, vocabulary], any float dtype.
        targets: int64 [tokens], without -100.

    Returns:
        float32 [tokens].
    """
    logits = logits.float()
    return torch.logsumexp(logits, dim=-1) - logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def next_token_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> LossSum:
    """Sum the cross-entropy over tokens, with label smoothing and z-loss.

    Per token, with p = softmax(logits) and Z the partition function:

        (1 - e) * -log p[target] + e * mean_v(-log p[v]) + z * (log Z)^2

    Label smoothing is Szegedy et al. (arXiv 1512.00567, section 7) with the uniform prior. The z-loss is PaLM's
    (Chowdhery et al., arXiv 2204.02311, section 5; they use 1e-4).

    Args:
        logits: [tokens, vocabulary], any float dtype; computed in float32.
        targets: int64 [tokens], without -100.
        weights: float [tokens], the weight of each token's loss; None for 1.
        label_smoothing: e, from 0 to 1.
        z_loss: z, 0 or more.
    """
    logits = logits.float()
    log_z = torch.logsumexp(logits, dim=-1)
    nll = log_z - logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    loss = nll
    if label_smoothing:
        loss = (1 - label_smoothing) * nll + label_smoothing * (log_z - logits.mean(dim=-1))
    if z_loss:
        loss = loss + z_loss * log_z.square()
    if weights is not None:
        weights = weights.to(loss.dtype)
        return LossSum((loss * weights).sum(), nll.detach().sum(), weights.sum(), nll.detach())
    return LossSum(loss.sum(), nll.detach().sum(), nll.new_tensor(float(nll.numel())), nll.detach())
