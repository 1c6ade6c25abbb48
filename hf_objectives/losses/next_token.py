"""The next-token loss. It returns sums, and the caller divides them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_objectives.errors import ConfigError
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


def next_token_targets(labels: Tensor, last: float = IGNORE_INDEX) -> Tensor:
    """Shift labels by one, so that each position holds the label that it predicts.

    Args:
        labels: int64 [batch, length], unshifted, -100 where a token is not trained. Or another value of each token.
        last: the value of the last position, which predicts nothing.

    Returns:
        [batch, length]. No position predicts the first label.
    """
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=last)


#: Columns of what each position predicts: the column that each is made of, and its value at the end of a row.
SHIFTED = {
    "shift_labels": ("labels", IGNORE_INDEX),
    "shift_weights": ("loss_weights", 1),
    "shift_sources": ("source_ids", -1),
}


def shifted_columns(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """The columns of what each position predicts: label, weight and source of the next token.

    A batch may have them already. It must where its rows are cut, because the next token of a part's last one is in another
    part.

    Args:
        batch: `labels`, `loss_weights` and `source_ids` ([batch, length], unshifted), or `shift_labels`, `shift_weights` and
            `shift_sources` in their place; a column that it lacks in both forms is left out.

    Returns:
        The columns of `SHIFTED`, [batch, length].

    Raises:
        ConfigError: a batch without labels, or with labels of another shape than its `input_ids`.
    """
    named = isinstance(batch, Mapping)
    labels = batch.get("shift_labels", batch.get("labels")) if named else None
    if labels is None:
        found = ", ".join(batch) if named else type(batch).__name__
        raise ConfigError(f"the batch has no labels (it has {found}); expected a data_collator that gives labels")
    if "input_ids" in batch and labels.shape != batch["input_ids"].shape:
        raise ConfigError(
            f"labels of shape {[*labels.shape]} for input_ids of shape {[*batch['input_ids'].shape]}; expected a "
            "data_collator that gives one label per token"
        )
    return {
        name: batch[name] if name in batch else next_token_targets(batch[column], last)
        for name, (column, last) in SHIFTED.items()
        if name in batch or column in batch
    }


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
