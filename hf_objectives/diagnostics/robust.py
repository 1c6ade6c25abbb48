"""Robust figures of a noisy curve: level, noise, trend and excursions by medians, which a few outliers cannot move."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

Values = NDArray[np.float64]
MAD = 1.4826  #: a normal distribution's standard deviation over its median absolute deviation
_DEVIATIONS = 6.0  # of the noise around the level; one normal value in 10^9
_Q99 = 2.326  # standard deviations, of the normal distribution


def noise(values: Values, *, bends: bool = False) -> float:
    """Standard deviation of the noise around a curve's trend, from the differences of neighbours (median, MAD).

    Where a curve `bends` within few values, from the second differences, which a trend that turns does not widen.
    """
    if len(values) < 3:
        return 0.0
    if bends:
        return float(MAD * np.median(np.abs(np.diff(values, 2))) / math.sqrt(6))
    steps = np.diff(values)
    return float(MAD * np.median(np.abs(steps - np.median(steps))) / math.sqrt(2))


def block_medians(values: Values, blocks: int) -> Values:
    """Medians of `blocks` equal stretches (fewer where there are fewer values), float64 [blocks]."""
    blocks = min(blocks, len(values))
    edges = np.linspace(0, len(values), blocks + 1).astype(int)
    return np.array([np.median(values[a:b]) for a, b in itertools.pairwise(edges)])


@dataclass(frozen=True, slots=True)
class Trend:
    """A straight trend over a stretch: the change from its beginning to its end, with bounds, and Kendall's p-value that
    it falls."""

    change: float
    low: float
    high: float
    p_falls: float


def trend(values: Values, blocks: int = 60) -> Trend:
    """Theil and Sen's slope over block medians, as the change over the whole stretch, with 95 % bounds.

    Blocks hold eight values where there are enough, so that a little correlation between neighbours does not pass for trend.
    """
    medians = block_medians(values, min(blocks, max(len(values) // 8, 8)))
    if len(medians) < 4:
        return Trend(0.0, -math.inf, math.inf, 1.0)
    at = np.arange(len(medians))
    slope = stats.theilslopes(medians, at, 0.95)
    falls = stats.kendalltau(at, medians, alternative="less")
    span = len(medians)
    p = float(falls.pvalue)
    return Trend(slope.slope * span, slope.low_slope * span, slope.high_slope * span, 1.0 if math.isnan(p) else p)


@dataclass(frozen=True, slots=True)
class Excursion:
    """A stretch above the level before it.

    Attributes:
        start: index of its first value.
        end: index after its last one; the number of values where it has not come back.
        level: median before it.
        height: its highest value over that level.
        deviations: the height in standard deviations of the noise there.
        back: it came back to the level.
    """

    start: int
    end: int
    level: float
    height: float
    deviations: float
    back: bool


def _first_not_above(values: Values, at: int, bound: float) -> int:
    """Index from `at` on of the first value that is not above the bound; the number of values where there is none."""
    size = 256  # grows: a log of a million steps may have many excursions, most of them short
    while at < len(values):
        found = np.flatnonzero(~(values[at : at + size] > bound))
        if len(found):
            return at + int(found[0])
        at, size = at + size, 4 * size
    return len(values)


def excursions(values: Values, *, most: int = 50) -> list[Excursion]:
    """Stretches that rise out of the noise around the median of the values before them.

    The threshold is six standard deviations of the local noise (its median absolute deviation), up to twelve where the
    curve's own noise has heavier tails than a normal one. Needs 16 values; gives at most the first `most`.
    """
    n = len(values)
    if n < 16:
        return []
    window = min(max(n // 10, 8), 64)
    series = pd.Series(values)
    before = series.rolling(window, min_periods=5).median().shift(1)
    # Of neighbours' differences, which a steep beginning does not widen.
    scale = MAD / math.sqrt(2) * series.diff().abs().rolling(2 * window, min_periods=5).median().shift(1)
    around = (series - before.shift(-(window // 2))).dropna().to_numpy()
    usual = MAD * float(np.median(np.abs(around)))
    # How much heavier the lower tail is than a normal one; the upper tail is where the excursions are.
    later = around[len(around) // 10 :]  # the steep beginning of a run has a lower tail of its own
    tail = max(1.0, float(np.quantile(-later, 0.99)) / max(_Q99 * usual, 1e-300)) if n >= 100 else 1.0
    deviation = np.maximum(scale.fillna(np.inf).to_numpy(), max(usual, noise(values), 1e-12))
    limit = _DEVIATIONS * min(tail, 2.0) * deviation
    level = before.fillna(np.inf).to_numpy()
    # The median of the next five: one low value among high ones is no return, and five at half the limit are a new level.
    coming = series[::-1].rolling(5, min_periods=3).median()[::-1].to_numpy()
    shifted = (coming > level + 0.6 * limit) & (values > level + 0.5 * limit)
    above = np.flatnonzero((values > level + limit) | shifted)
    found: list[Excursion] = []
    at = 0
    while len(found) < most:
        k = int(np.searchsorted(above, at))
        if k == len(above):
            break
        start = int(above[k])
        risen = coming[start] - level[start] if shifted[start] else limit[start]
        bound = level[start] + min(limit[start], risen) / 2
        # With fewer than three values left the median of the next is unknown: whether it came back, too.
        end = _first_not_above(coming, start + 1, bound)
        back = end < n and not math.isnan(coming[end])
        end = end if back else n
        while end < n and values[end] > bound:  # the median falls two values before the last one above
            end += 1
        height = float(values[start:end].max() - level[start])
        found.append(Excursion(start, end, float(level[start]), height, height / float(deviation[start]), back))
        at = end + 1
    return found
