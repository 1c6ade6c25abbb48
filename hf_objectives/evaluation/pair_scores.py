"""Log-probabilities of preference pairs: figures of each pair for evaluation, sums for training logs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_objectives.evaluation.calibration import wilson_interval
from hf_objectives.evaluation.counts import TokenCount

_SIDES = ("chosen", "rejected")
#: Columns of the figures of a pair: its row number (-1: unknown); nats of both answers under the policy and under the
#: reference (NaN: unknown); their tokens; their rewards.
COLUMNS = ("row", *(name.format(side) for name in ("{}", "ref_{}", "{}_n", "{}_r") for side in _SIDES))


@dataclass(frozen=True, slots=True)
class PairScores:
    """Log-probabilities of `n` pairs, first the chosen answers and then the rejected ones.

    Attributes:
        policy: float [2n, width - 1], log-probability of each token after the first, 0 outside the answers; with gradient.
        reference: the same under the reference; None where only sums are known.
        mask: int64 [2n, width - 1], 1 at the tokens of the answers.
        reference_sums: float [2n], sums under the reference where they were computed before training.
        ld_alpha: weight of the tokens beyond the length of the shorter answer (LD-DPO, arXiv 2409.06411); None for 1.
    """

    policy: Tensor
    reference: Tensor | None
    mask: Tensor
    reference_sums: Tensor | None = None
    ld_alpha: float | None = None

    def weighted(self, logps: Tensor) -> Tensor:
        """Sum over each answer with the loss's weights, [2n]."""
        if self.ld_alpha is None:
            return logps.sum(dim=1)
        shared = torch.minimum(*self.mask.sum(dim=1).chunk(2)).repeat(2)
        tail = self.mask.cumsum(dim=1) > shared[:, None]
        return (logps * ~tail).sum(dim=1) + self.ld_alpha * (logps * tail).sum(dim=1)

    def log_ratios(self) -> Tensor:
        """log π(y|x) − log π_ref(y|x) of each answer, [2n], with gradient."""
        reference = self.reference_sums if self.reference is None else self.weighted(self.reference)
        assert reference is not None
        return self.weighted(self.policy) - reference

    def chosen_nll(self) -> Tensor:
        """Nats per chosen token over the batch, with gradient."""
        return -self.policy.chunk(2)[0].sum() / self.mask.chunk(2)[0].sum().clamp(min=1)

    @torch.no_grad()
    def rows(self, beta: float, row_ids: Tensor | None) -> Tensor:
        """The figures of each pair, float64 [n, columns], see COLUMNS."""
        nats = -self.policy.double().sum(dim=1)
        if self.reference is not None:
            reference = -self.reference.double().sum(dim=1)
        elif self.reference_sums is not None and self.ld_alpha is None:
            reference = -self.reference_sums.double()
        else:  # a sum with weighted tails is not in nats
            reference = torch.full_like(nats, math.nan)
        rewards = (beta * self.log_ratios()).double()
        ids = nats.new_full((len(nats) // 2,), -1.0) if row_ids is None else row_ids.to(nats)
        figures = (nats, reference, self.mask.sum(dim=1).double(), rewards)
        return torch.stack([ids, *(side for values in figures for side in values.chunk(2))], dim=1)

    @torch.no_grad()
    def drift(self) -> Tensor:
        """Sums of the change since the reference, float64 [5]: nats of chosen and rejected, their tokens, pairs."""
        if self.reference is not None:
            change = (self.policy - self.reference).double().sum(dim=1)
        else:
            assert self.reference_sums is not None
            change = self.policy.double().sum(dim=1) - self.reference_sums.double()
        chosen, rejected = change.view(2, -1).sum(dim=1), self.mask.sum(dim=1).view(2, -1).sum(dim=1).double()
        return torch.stack([*chosen, *rejected, chosen.new_tensor(len(change) / 2)])


def unique_rows(parts: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Join the pairs of all ranks and keep each numbered row once: ranks repeat rows to fill their last batches."""
    rows = np.concatenate(parts)
    numbered = rows[:, 0] >= 0
    _, first = np.unique(rows[numbered, 0], return_index=True)
    return np.concatenate([rows[numbered][np.sort(first)], rows[~numbered]])


def nats_per_token(rows: NDArray[np.float64], prefix: str = "") -> dict[str, float]:
    """Nats per token of the chosen and of the rejected answers; NaN where unknown.

    Args:
        rows: float64 [n, columns].
        prefix: "" for the policy, "ref_" for the reference.
    """
    columns = dict(zip(COLUMNS, rows.T, strict=True))
    return {side: float(columns[prefix + side].sum() / columns[f"{side}_n"].sum()) for side in _SIDES}


def pair_figures(rows: NDArray[np.float64]) -> dict[str, float]:
    """Compute the metrics of an evaluation over pairs.

    A perplexity is exp(nats / tokens) over all answers of a side. Accuracy is the share of pairs whose chosen answer has
    the higher reward, with its 95 % interval (Wilson 1927).

    Args:
        rows: float64 [n, columns], each pair once.
    """
    columns = dict(zip(COLUMNS, rows.T, strict=True))
    tokens = {side: int(columns[f"{side}_n"].sum()) for side in _SIDES}
    figures: dict[str, float] = {}
    for prefix, name in (("", ""), ("ref_", "reference_")):
        for side in _SIDES:
            nats = float(columns[prefix + side].sum())
            if not math.isnan(nats):
                figures[f"{name}{side}_perplexity"] = TokenCount(nats, tokens[side]).perplexity
    chosen, rejected = columns["chosen_r"], columns["rejected_r"]
    wins = int((chosen > rejected).sum())
    low, high = wilson_interval(wins, len(rows))
    return {
        **figures,
        "num_pairs": len(rows),
        "num_chosen_tokens": tokens["chosen"],
        "num_rejected_tokens": tokens["rejected"],
        "rewards/accuracies": wins / len(rows),
        "rewards/accuracies_low": low,
        "rewards/accuracies_high": high,
        "rewards/margins": float((chosen - rejected).mean()),
        "rewards/chosen": float(chosen.mean()),
        "rewards/rejected": float(rejected.mean()),
    }
