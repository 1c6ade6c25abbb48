"""Measure level, noise, trend and excursions of a noisy curve by medians, which a few outliers cannot move."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

Values = NDArray[np.float64]
MAD = 1.4826  #: standard deviation of a normal distribution over its median absolute deviation
_DEVIATIONS = 6.0  # of the noise above the level; one normal value in 10^9 lies higher
_Q99 = 2.326  # the 99 % quantile of a standard normal distribution


def noise(values: Values, *, bends: bool = False) -> float:
    """Standard deviation of the noise around a curve's trend, from the differences of neighbours (float64 [points]).

    With `bends` from second differences, which a trend that turns within few values does not widen.
    """
    if len(values) < 3:
        return 0.0
    if bends:
        return float(MAD * np.median(np.abs(np.diff(values, 2))) / math.sqrt(6))
    return float(stats.median_abs_deviation(np.diff(values), scale="normal") / math.sqrt(2))


def edges(values: Values, share: int = 10) -> tuple[float, float]:
    """Medians of the first and of the last tenth (`share`) of the values, each of three values at least."""
    few = max(3, len(values) // share)
    return float(np.median(values[:few])), float(np.median(values[-few:]))


def block_medians(values: Values, blocks: int) -> Values:
    """Medians of equal stretches, float64 [blocks]; there are never more stretches than values."""
    blocks = min(blocks, len(values))
    cuts = np.linspace(0, len(values), blocks + 1).astype(int)[1:-1]
    return np.array([np.median(part) for part in np.split(values, cuts)])


class Trend(NamedTuple):
    """A straight trend: its change from beginning to end, 95 % bounds of it, and Kendall's p-value of a fall."""

    change: float
    low: float
    high: float
    p_falls: float


def trend(values: Values, blocks: int = 60) -> Trend:
    """Slope of Theil and Sen over block medians, as the change over the whole curve.

    A block holds at least eight values where there are enough. So a little correlation between neighbours is no trend.
    """
    medians = block_medians(values, min(blocks, max(len(values) // 8, 8)))
    count = len(medians)
    if count < 4:
        return Trend(0.0, -math.inf, math.inf, 1.0)
    slope = stats.theilslopes(medians)
    p_value = float(stats.kendalltau(np.arange(count), medians, alternative="less").pvalue)
    change, low, high = (float(each) * count for each in (slope.slope, slope.low_slope, slope.high_slope))
    return Trend(change, low, high, 1.0 if math.isnan(p_value) else p_value)


class Excursion(NamedTuple):
    """A stretch above the level before it."""

    start: int  #: index of its first value
    end: int  #: index after its last value; the number of values where it does not come back
    level: float  #: the median before it
    height: float  #: its highest value minus the level
    deviations: float  #: the height in standard deviations of the noise there
    back: bool  #: whether it came back to the level

    @property
    def peak(self) -> float:
        """Its highest value."""
        return self.level + self.height


def excursions(values: Values, *, most: int = 50) -> list[Excursion]:
    """The first stretches (`most`) that rise out of the noise around the median of the values before; 16 points are needed.

    The threshold is six standard deviations of the local noise, up to twelve where the curve's own noise has heavier tails
    than a normal one.
    """
    n = len(values)
    if n < 16:
        return []
    level, deviation, limit = _thresholds(values)
    # The median of the next five: one low value among high ones is no return, and five at half the limit are a new level.
    coming = pd.Series(values)[::-1].rolling(5, min_periods=3).median()[::-1].to_numpy()
    shifted = (coming > level + 0.6 * limit) & (values > level + 0.5 * limit)
    above = np.flatnonzero((values > level + limit) | shifted)
    found: list[Excursion] = []
    position = 0
    while len(found) < most and (k := int(np.searchsorted(above, position))) < len(above):
        start = int(above[k])
        risen = coming[start] - level[start] if shifted[start] else limit[start]
        bound = level[start] + min(limit[start], risen) / 2
        low = ~(coming[start + 1 :] > bound)
        end = start + 1 + int(low.argmax()) if low.any() else n
        # With fewer than three values left the median of the next five is unknown, and so is the return.
        back = end < n and not math.isnan(coming[end])
        end = end if back else n
        while end < n and values[end] > bound:  # the median falls two values before the last one above
            end += 1
        height = float(values[start:end].max() - level[start])
        found.append(Excursion(start, end, float(level[start]), height, height / float(deviation[start]), back))
        position = end + 1
    return found


def _thresholds(values: Values) -> tuple[Values, Values, Values]:
    """Level before each value, deviation of the noise there, and the height from which on an excursion begins."""
    n = len(values)
    window = min(max(n // 10, 8), 64)
    series = pd.Series(values)
    before = series.rolling(window, min_periods=5).median().shift(1)
    # Differences of neighbours: a steep beginning does not widen them.
    local = MAD / math.sqrt(2) * series.diff().abs().rolling(2 * window, min_periods=5).median().shift(1)
    around = (series - before.shift(-(window // 2))).dropna().to_numpy()
    usual = MAD * float(np.median(np.abs(around)))
    deviation = np.maximum(local.fillna(np.inf).to_numpy(), max(usual, noise(values), 1e-12))
    tail = 1.0
    if n >= 100:
        # How much heavier the lower tail is than a normal one. The upper tail holds the excursions themselves, and the
        # steep beginning of a run has a lower tail of its own.
        later = around[len(around) // 10 :]
        tail = max(1.0, float(np.quantile(-later, 0.99)) / max(_Q99 * usual, 1e-300))
    return before.fillna(np.inf).to_numpy(), deviation, _DEVIATIONS * min(tail, 2.0) * deviation
