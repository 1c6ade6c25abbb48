"""How far preferences can be believed: intervals of a share, calibration of stated confidence, correlation of ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hf_objectives.errors import ConfigError

NORMAL_95 = 1.959963984540054  # 97.5 % quantile of the standard normal distribution


def wilson_interval(successes: float, trials: int, *, z: float = NORMAL_95) -> tuple[float, float]:
    """Interval of the success probability behind `successes` of `trials`, Wilson's (1927, J. Am. Stat. Assoc. 22:209).

    Args:
        successes: how many, from 0 to `trials`; halves are fine.
        trials: how many were tried, at least 1.
        z: quantile of the normal distribution; the default gives 95 %.

    Returns:
        Lower and upper end, from 0 to 1.

    Raises:
        ConfigError: no trial, or more successes than trials.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ConfigError(f"{successes} of {trials}; expected at least one trial, and 0 to as many successes")
    share, square = successes / trials, z * z
    scale = 1 + square / trials
    middle = share + square / (2 * trials)
    half = z * math.sqrt(share * (1 - share) / trials + square / (4 * trials * trials))
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


@dataclass(frozen=True, slots=True)
class Reliability:
    """Pairs by the confidence of their choice, in bins of equal width over [0.5, 1].

    Attributes:
        edges: float64 [bins + 1], the ends of the bins; a bin holds its upper end, the first its lower end too.
        counts: int64 [bins], pairs in each.
        confidence, accuracy: float64 [bins], means in each bin; NaN in an empty one.
    """

    edges: NDArray[np.float64]
    counts: NDArray[np.int64]
    confidence: NDArray[np.float64]
    accuracy: NDArray[np.float64]

    @property
    def expected_calibration_error(self) -> float:
        """Mean over pairs of their bin's |accuracy - confidence|: Guo et al. 2017 (arXiv 1706.04599), equation 3."""
        full = self.counts > 0
        gaps = np.abs(self.accuracy[full] - self.confidence[full])
        return float((self.counts[full] * gaps).sum() / self.counts.sum())


def reliability(margins: ArrayLike, *, bins: int = 10) -> Reliability:
    """Compare the confidence of a model of preferences with how often it is right.

    Under Bradley and Terry's model a margin m, the reward of the chosen answer less that of the rejected one, says that
    the chosen answer is preferred with probability sigmoid(m). The model's own choice is the answer of the higher reward;
    its confidence in it is sigmoid(|m|), at least one half, and it is right where m > 0. A tie has confidence one half and
    counts as half right.

    Args:
        margins: float [pairs], finite.
        bins: number of bins.

    Raises:
        ConfigError: no pair, a margin that is not finite, or no bin.
    """
    margins = np.asarray(margins, np.float64).reshape(-1)
    if bins < 1 or not len(margins) or not np.isfinite(margins).all():
        raise ConfigError(f"{len(margins)} margins in {bins} bins; expected at least one of each, all margins finite")
    confidence = 1 / (1 + np.exp(-np.abs(margins)))
    right = (np.sign(margins) + 1) / 2
    edges = np.linspace(0.5, 1, bins + 1)
    which = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    counts = np.bincount(which, minlength=bins)
    with np.errstate(invalid="ignore"):
        means = [np.bincount(which, weights=values, minlength=bins) / counts for values in (confidence, right)]
    return Reliability(edges, counts, *means)


def rank_correlation(first: ArrayLike, second: ArrayLike) -> float:
    """Spearman's rank correlation of two float arrays [n], equal values sharing their mean rank; NaN where one is constant.

    Raises:
        ConfigError: arrays of different lengths.
    """
    ranks = [_ranks(np.asarray(values, np.float64).reshape(-1)) for values in (first, second)]
    if len(ranks[0]) != len(ranks[1]):
        raise ConfigError(f"{len(ranks[0])} values beside {len(ranks[1])}; expected as many")
    a, b = (rank - rank.mean() if len(rank) else rank for rank in ranks)
    scale = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / scale if scale > 0 else math.nan


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[which]
