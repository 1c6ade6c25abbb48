"""Telling a spike from noise while the run goes on, from the losses so far."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import numpy as np

from hf_objectives.diagnostics.robust import MAD

_DEVIATIONS = 6.0  # of the noise around the level
_HIGH = 2.5  # deviations from which a step's examples are worth a look
_SHARE = 0.1  # of the level: less is no spike, however quiet the run
_LOWEST_OF_64 = 3.2  # standard deviations that the lowest of 64 normal values stays above, 19 times of 20


@dataclass(frozen=True, slots=True)
class Spike:
    """A loss out of its noise: `value`, the `level` (median) before it, the `limit` that it passed, and `deviations` of the
    noise that it lies above the level."""

    value: float
    level: float
    limit: float
    deviations: float


class SpikeMonitor:
    """Compares each loss with the median and the noise (median absolute difference of neighbours) of those before.

    A spike is kept out of what later losses are compared with; `patience` spikes in a row are a new level, which is taken.

    Args:
        window: losses that are looked back on.
        warmup: losses before the first judgement.
        patience: spikes in a row after which the new level is accepted.

    Attributes:
        high: the loss added last is no spike, but high enough that one bad example among good ones may be the cause.
    """

    def __init__(self, window: int = 64, warmup: int = 12, patience: int = 20) -> None:
        self._warmup, self._patience = warmup, patience
        self._kept: deque[float] = deque(maxlen=window)
        self._apart: list[float] = []
        self.high = False

    def add(self, value: float) -> Spike | None:
        """Take the loss of a step; a spike if it is one. A loss that is not finite is one and never kept."""
        self.high = False
        spike = self._judge(value)
        if spike is None:
            self._kept.append(value)
            self._apart.clear()
        elif math.isfinite(value):
            self._apart.append(value)
            if len(self._apart) >= self._patience:
                self._kept.clear()
                self._kept.extend(self._apart)
                self._apart.clear()
        return spike

    def _judge(self, value: float) -> Spike | None:
        if not math.isfinite(value):
            level = float(np.median(self._kept)) if self._kept else math.nan
            return Spike(value, level, math.inf, math.inf)
        if len(self._kept) < self._warmup:
            return None
        kept = np.array(self._kept)
        level = float(np.median(kept[-16:]))
        around = kept - np.median(kept)
        noise = float(MAD * np.median(np.abs(np.diff(kept))) / math.sqrt(2))
        # Losses whose low outliers reach further than normal ones have high outliers that do, too.
        low = float(-(kept[-32:] - np.median(kept[-32:])).min()) / max(noise, 1e-12)
        tail = min(max(low / _LOWEST_OF_64, 1.0), 2.0)
        # On the way down the values before lie above: their spread is no reason to look away.
        deviation = (
            max(noise, 1e-12) if around[-1] < 0 else max(noise, float(MAD * np.median(np.abs(around))) / 2, 1e-12)
        )
        limit = level + max(_DEVIATIONS * tail * deviation, _SHARE * abs(level))
        self.high = limit >= value > level + _HIGH * deviation
        return Spike(value, level, limit, (value - level) / deviation) if value > limit else None
