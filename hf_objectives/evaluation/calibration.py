"""How far preferences can be trusted: the interval of a share, and the calibration of stated confidence."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hf_objectives.errors import ConfigError

_Z = 1.959963984540054  # 97.5 % quantile of the standard normal distribution


def wilson_interval(successes: float, trials: int) -> tuple[float, float]:
    """Compute the lower and upper end of Wilson's 95 % interval of a success probability (1927, J. Am. Stat. Assoc. 22:209).

    `scipy.stats.binomtest` gives the same, and takes whole successes only; a tie is half of one.

    Raises:
        ConfigError: no trial, or more successes than trials.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ConfigError(f"{successes} of {trials}; expected at least one trial, and 0 to as many successes")
    share, square = successes / trials, _Z**2
    scale = 1 + square / trials
    middle = share + square / (2 * trials)
    half = _Z * math.sqrt(share * (1 - share) / trials + square / (4 * trials * trials))
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


@dataclass(frozen=True, slots=True)
class Reliability:
    """Pairs by the confidence of the model's choice, in bins of equal width over [0.5, 1].

    Attributes:
        edges: float64 [bins + 1], the ends of the bins. A bin holds its upper end, and the first also its lower end.
        counts: int64 [bins], pairs in each bin.
        confidence, accuracy: float64 [bins], means in each bin; NaN in an empty one.
    """

    edges: NDArray[np.float64]
    counts: NDArray[np.int64]
    confidence: NDArray[np.float64]
    accuracy: NDArray[np.float64]

    @property
    def expected_calibration_error(self) -> float:
        """Mean over pairs of their bin's |accuracy - confidence| (Guo et al. 2017, arXiv 1706.04599, equation 3)."""
        full = self.counts > 0
        gaps = np.abs(self.accuracy[full] - self.confidence[full])
        return float((self.counts[full] * gaps).sum() / self.counts.sum())


def reliability(margins: ArrayLike, *, bins: int = 10) -> Reliability:
    """Compare the confidence of a preference model with its accuracy.

    A margin m is the reward of the chosen answer minus that of the rejected one. Under Bradley and Terry's model the
    chosen answer is preferred with probability sigmoid(m). So the model chooses the answer of higher reward with
    confidence sigmoid(|m|), and it is right where m > 0. A tie has confidence one half and counts as half right.

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
