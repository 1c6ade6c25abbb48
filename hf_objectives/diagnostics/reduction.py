"""Curves with no more points than can be seen, and their trend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

BUCKETS = 1200  # across a panel, about its pixels


def reduce_points(
    steps: NDArray[np.int64], values: NDArray[np.float64], buckets: int = BUCKETS
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """A curve by its extremes: the least and the greatest value of each of `buckets` equal spans of steps.

    Args:
        steps: [points], rising.
        values: [points]; infinities become NaN, and NaN stays where a span has nothing else: a gap.
        buckets: how many spans.

    Returns:
        Steps and values [at most 2 * buckets], the curve itself where it has no more.
    """
    values = np.where(np.isfinite(values), values, np.nan)
    if len(values) <= 2 * buckets:
        return steps, values
    bucket = _bucket(steps, buckets)
    order = np.lexsort((values, bucket))
    finite = order[np.isfinite(values[order])]
    of = bucket[finite]
    changes = of[1:] != of[:-1]
    first, last = np.append(True, changes)[: len(of)], np.append(changes, True)[: len(of)]
    starts = _starts(bucket)
    empty = starts[~np.isin(bucket[starts], of)]
    keep = np.unique(np.concatenate([finite[first], finite[last], empty]))
    return steps[keep], values[keep]


def smooth_points(
    steps: NDArray[np.int64], values: NDArray[np.float64], *, geometric: bool = False
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The trend of a curve: its moving median over a tenth of it, and a short moving mean over that.

    A lone spike leaves no mark on a median, and a step stays a step, where a mean would begin to rise before it. Windows
    are centred, without the lag of trailing ones, and narrower towards both ends.

    Args:
        steps: [points], rising.
        values: [points]; what is not finite counts for nothing and is a gap in the result.
        geometric: of the logarithms, as perplexity needs; values that are not positive count for nothing.

    Returns:
        Steps and trend, float64 [points]; of a long curve, over spans of it [at most BUCKETS].
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        y = np.log(values) if geometric else np.asarray(values, float)
    at, good = steps.astype(float), np.isfinite(y)
    y = np.where(good, y, np.nan)
    if len(y) > 2 * BUCKETS:
        starts = _starts(_bucket(steps, BUCKETS))
        at = np.add.reduceat(at, starts) / np.diff(np.append(starts, len(y)))
        counts = np.add.reduceat(good.astype(float), starts)
        with np.errstate(invalid="ignore"):
            y = np.add.reduceat(np.where(good, y, 0.0), starts) / counts
    half = max(1, len(y) // 20)
    trend = _moving(np.mean, _moving(np.median, y, half), half // 4)
    with np.errstate(over="ignore"):
        return at, np.exp(trend) if geometric else trend


def _moving(of: Callable[..., Any], y: NDArray[np.float64], most: int) -> NDArray[np.float64]:
    result, good = np.full(len(y), np.nan), np.isfinite(y)
    for i in np.flatnonzero(good).tolist():
        half = min(most, i, len(y) - 1 - i)
        window = slice(i - half, i + half + 1)
        result[i] = of(y[window][good[window]])
    return result


def _bucket(steps: NDArray[np.int64], buckets: int) -> NDArray[np.int64]:
    span = max(1, int(steps[-1] - steps[0]))
    return np.minimum((steps - steps[0]) * buckets // span, buckets - 1)


def _starts(bucket: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.flatnonzero(np.append(True, bucket[1:] != bucket[:-1]))
