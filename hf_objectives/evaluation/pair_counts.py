"""What the log-probabilities of preference pairs add up to: pair by pair for evaluation, in sums for training."""

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

#: Columns of the figures of one pair: its row number (-1: unknown); nats of both answers under the policy and under the
#: reference (NaN: unknown); their tokens; their rewards.
COLUMNS = (
    "row",
    "chosen",
    "rejected",
    "ref_chosen",
    "ref_rejected",
    "chosen_n",
    "rejected_n",
    "chosen_r",
    "rejected_r",
)


@dataclass(frozen=True, slots=True)
class PairScores:
    """Log-probabilities of a batch of `n` pairs, chosen and rejected.

    Attributes:
        policy: float [2n, width - 1], log-probability of each token after the first, 0 outside of the answers; with graph.
        reference: the same under the reference; None where only sums are known.
        mask: int64 [2n, width - 1], the tokens of the answers.
        reference_sums: float [2n], sums under the reference, where it was computed beforehand.
        ld_alpha: weight of tokens beyond the length of the shorter answer (LD-DPO, arXiv 2409.06411); None for 1.
    """

    policy: Tensor
    reference: Tensor | None
    mask: Tensor
    reference_sums: Tensor | None = None
    ld_alpha: float | None = None

    def weighted(self, logps: Tensor) -> Tensor:
        """Sums over each answer, [2n], as the loss takes them."""
        if self.ld_alpha is None:
            return logps.sum(dim=1)
        shared = torch.minimum(*self.mask.sum(dim=1).chunk(2)).repeat(2)
        tail = self.mask.cumsum(dim=1) > shared[:, None]
        return (logps * ~tail).sum(dim=1) + self.ld_alpha * (logps * tail).sum(dim=1)

    def log_ratios(self) -> Tensor:
        """log π(y|x) − log π_ref(y|x) of each answer, [2n], with graph."""
        reference = self.reference_sums if self.reference is None else self.weighted(self.reference)
        assert reference is not None
        return self.weighted(self.policy) - reference

    def chosen_nll(self) -> Tensor:
        """Nats per chosen token over the batch, with graph."""
        return -self.policy.chunk(2)[0].sum() / self.mask.chunk(2)[0].sum().clamp(min=1)

    @torch.no_grad()
    def rows(self, beta: float, row_ids: Tensor | None) -> Tensor:
        """The figures of each pair, float64 [n, columns], see COLUMNS."""
        nats = -self.policy.double().sum(dim=1)
        if self.reference is not None:
            reference = -self.reference.double().sum(dim=1)
        elif self.reference_sums is not None and self.ld_alpha is None:
            reference = -self.reference_sums.double()
        else:  # sums in which the tails have another weight are no nats
            reference = torch.full_like(nats, math.nan)
        rewards = (beta * self.log_ratios()).double()
        ids = nats.new_full((len(nats) // 2,), -1.0) if row_ids is None else row_ids.to(nats)
        columns = [part for of in (nats, reference, self.mask.sum(dim=1).double(), rewards) for part in of.chunk(2)]
        return torch.stack([ids, *columns], dim=1)

    @torch.no_grad()
    def drift(self) -> Tensor:
        """Sums for training's log, float64 [5]: change of chosen and of rejected answers in nats, their tokens, pairs."""
        if self.reference is not None:
            change = (self.policy - self.reference).double().sum(dim=1)
        else:
            assert self.reference_sums is not None
            change = self.policy.double().sum(dim=1) - self.reference_sums.double()
        chosen, rejected = change.view(2, -1).sum(dim=1), self.mask.sum(dim=1).view(2, -1).sum(dim=1).double()
        return torch.stack([*chosen, *rejected, chosen.new_tensor(len(change) / 2)])


def unique_rows(parts: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """The pairs of all ranks, each numbered row once: the last batches of ranks repeat rows to be of one size."""
    rows = np.concatenate(parts)
    numbered = rows[:, 0] >= 0
    _, first = np.unique(rows[numbered, 0], return_index=True)
    return np.concatenate([rows[numbered][np.sort(first)], rows[~numbered]])


def nats_per_token(rows: NDArray[np.float64], prefix: str = "") -> dict[str, float]:
    """Mean negative log-likelihood of a token of the chosen and of the rejected answers; NaN where it is not known.

    Args:
        prefix: "" for the policy, "ref_" for the reference.
    """
    of = dict(zip(COLUMNS, rows.T, strict=True))
    return {side: float(of[prefix + side].sum() / of[f"{side}_n"].sum()) for side in ("chosen", "rejected")}


def pair_figures(rows: NDArray[np.float64]) -> dict[str, float]:
    """Metrics of an evaluation over pairs, float64 [n, columns], each counted once.

    Perplexities are exp(nats / tokens) over all tokens of a side. Accuracy counts the pairs whose chosen answer has the
    higher reward, with its 95 % interval (Wilson 1927).
    """
    of = dict(zip(COLUMNS, rows.T, strict=True))
    tokens = {side: int(of[f"{side}_n"].sum()) for side in ("chosen", "rejected")}
    figures: dict[str, float] = {}
    for prefix, name in (("", ""), ("ref_", "reference_")):
        for side in tokens:
            nats = float(of[prefix + side].sum())
            if not math.isnan(nats):
                figures[f"{name}{side}_perplexity"] = TokenCount(nats, tokens[side]).perplexity
    wins = int((of["chosen_r"] > of["rejected_r"]).sum())
    low, high = wilson_interval(wins, len(rows))
    return {
        **figures,
        "num_pairs": len(rows),
        "num_chosen_tokens": tokens["chosen"],
        "num_rejected_tokens": tokens["rejected"],
        "rewards/accuracies": wins / len(rows),
        "rewards/accuracies_low": low,
        "rewards/accuracies_high": high,
        "rewards/margins": float((of["chosen_r"] - of["rejected_r"]).mean()),
        "rewards/chosen": float(of["chosen_r"].mean()),
        "rewards/rejected": float(of["rejected_r"].mean()),
    }
