"""Log-probabilities of preference pairs: figures of each pair for evaluation, sums for training logs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, zip_longest

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_objectives.evaluation.calibration import wilson_interval
from hf_objectives.evaluation.counts import TokenCount

_SIDES = ("chosen", "rejected")
#: Figures of each answer, float64; NaN where unknown. nats, ref_nats: under the policy and the reference; tokens: those that
#: are trained; length: those of the loss, a first one that nothing predicts among them; logps: log π(y|x) with the loss's
#: weights of tokens; ratio: logps less those of the reference; entropy, logits, top1: sums over the tokens of entropies, of
#: mean logits and of tokens that are the most likely ones; weight: that of WPO (arXiv 2406.11827, equation 2).
_FIGURES = ("nats", "ref_nats", "tokens", "length", "logps", "ratio", "entropy", "logits", "top1", "weight")
#: Columns of the figures of a pair: its row number (-1: unknown), and the figures of both answers.
COLUMNS = ("row", *(f"{side}_{name}" for name in _FIGURES for side in _SIDES))


@dataclass(frozen=True, slots=True)
class PairScores:
    """Log-probabilities of `n` pairs, first the chosen answers and then the rejected ones.

    Attributes:
        policy: float [2n, width - 1], log-probability of each token after the first, 0 outside the answers; with gradient.
        reference: the same under the reference; None where only sums are known.
        mask: int64 [2n, width - 1], 1 at the tokens of the answers.
        reference_sums: float [2n], sums under the reference where they were computed before training.
        ld_alpha: weight of the tokens beyond the length of the shorter answer (LD-DPO, arXiv 2409.06411); None for 1.
        lengths: int64 [2n], tokens of each answer, its first one too where nothing predicts it; None: as in `mask`.
        tokens: `entropy`, `mean_logits`, `is_top1` and `log_sum_sq_probs` of the policy, [2n, width - 1] each; those that
            are known.
    """

    policy: Tensor
    reference: Tensor | None
    mask: Tensor
    reference_sums: Tensor | None = None
    ld_alpha: float | None = None
    lengths: Tensor | None = None
    tokens: Mapping[str, Tensor] = field(default_factory=dict)

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
    def rows(self, row_ids: Tensor | None) -> Tensor:
        """The figures of each pair, float64 [n, columns], see COLUMNS."""
        exact = replace(self, policy=self.policy.double())
        unknown = exact.policy.new_full((len(self.mask),), math.nan)
        reference = unknown  # a sum with weighted tails is not in nats
        if self.reference is not None:
            given = self.reference.double()
            exact, reference = replace(exact, reference=given), -given.sum(dim=1)
        elif self.reference_sums is not None and self.ld_alpha is None:
            reference = -self.reference_sums.double()
        counts, there = self.mask.sum(dim=1).double(), self.mask == 1

        def total(name: str, less: Tensor | float = 0.0) -> Tensor:
            known = self.tokens.get(name)
            return unknown if known is None else (known.double() - less).where(there, 0.0).sum(dim=1)

        figures = {
            "nats": -exact.policy.sum(dim=1),
            "ref_nats": reference,
            "tokens": counts,
            "length": counts if self.lengths is None else self.lengths.double(),
            "logps": exact.weighted(exact.policy),
            "ratio": exact.log_ratios(),
            "entropy": total("entropy"),
            "logits": total("mean_logits"),
            "top1": total("is_top1"),
            "weight": (-total("log_sum_sq_probs", exact.policy) / counts.clamp(min=1)).exp(),
        }
        ids = unknown.new_full((len(unknown) // 2,), -1.0) if row_ids is None else row_ids.to(unknown)
        return torch.stack([ids, *(side for name in _FIGURES for side in figures[name].chunk(2))], dim=1)

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


def unique_rows(parts: Sequence[Sequence[NDArray[np.float64]]], total: int | None = None) -> NDArray[np.float64]:
    """Join the pairs of all ranks, each once: ranks repeat rows to fill their last batches.

    Args:
        parts: of each rank, its batches, float64 [n, columns].
        total: number of all pairs; None: unknown.

    Returns:
        float64 [pairs, columns], in the order of row numbers. Pairs without a number are in the order in which ranks take
        batches in turn, and end after `total` ones.
    """
    empty = np.empty((0, len(COLUMNS)))
    rows = np.concatenate([empty, *chain.from_iterable(zip_longest(*parts, fillvalue=empty))])
    numbered = rows[:, 0] >= 0
    _, first = np.unique(rows[numbered, 0], return_index=True)
    return np.concatenate([rows[numbered][first], rows[~numbered][:total]])


def by_column(rows: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """The columns of float64 [n, columns] by their names."""
    return dict(zip(COLUMNS, rows.T, strict=True))


def nats_per_token(rows: NDArray[np.float64], prefix: str = "") -> dict[str, float]:
    """Nats per token of the chosen and of the rejected answers; NaN where unknown.

    Args:
        rows: float64 [n, columns].
        prefix: "" for the policy, "ref_" for the reference.
    """
    columns = by_column(rows)
    return {side: float(columns[f"{side}_{prefix}nats"].sum() / columns[f"{side}_tokens"].sum()) for side in _SIDES}


def pair_figures(rows: NDArray[np.float64], beta: float) -> dict[str, float]:
    """Compute the metrics of an evaluation over pairs.

    A perplexity is exp(nats / tokens) over all answers of a side. Accuracy is the share of pairs whose chosen answer has
    the higher reward, with its 95 % interval (Wilson 1927). Figures of tokens are means over tokens, those of answers over
    pairs. What is unknown is left out.

    Args:
        rows: float64 [n, columns], each pair once.
        beta: what log ratios are multiplied with for rewards.
    """
    columns = by_column(rows)
    sums = {name: float(values.sum()) for name, values in columns.items()}
    tokens = {side: int(sums[f"{side}_tokens"]) for side in _SIDES}
    figures: dict[str, float] = {}
    for prefix, name in (("", ""), ("ref_", "reference_")):
        for side in _SIDES:
            nats = sums[f"{side}_{prefix}nats"]
            if not math.isnan(nats):
                figures[f"{name}{side}_perplexity"] = TokenCount(nats, tokens[side]).perplexity
    chosen, rejected = (beta * columns[f"{side}_ratio"] for side in _SIDES)
    wins = int((chosen > rejected).sum())
    low, high = wilson_interval(wins, len(rows))
    of_tokens = {
        "entropy": (sums["chosen_entropy"] + sums["rejected_entropy"]) / max(sum(tokens.values()), 1),
        "mean_token_accuracy": sums["chosen_top1"] / max(tokens["chosen"], 1),
        **{f"logits/{side}": sums[f"{side}_logits"] / max(tokens[side], 1) for side in _SIDES},
    }
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
        **{f"logps/{side}": sums[f"{side}_logps"] / len(rows) for side in _SIDES},
        **{name: value for name, value in of_tokens.items() if not math.isnan(value)},
    }
