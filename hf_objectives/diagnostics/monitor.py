"""Telling a spike from noise while the run goes on, from the losses so far."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from hf_objectives.diagnostics.robust import MAD

_DEVIATIONS = 6.0  # of the noise around the level
_FEW = 4  # losses, from which on the height of the next can be told, if roughly
_NONE = 1e-4  # nats: a loss that is not there yet, as with sparse rewards, or that is learned
_SHARE = 0.1  # of the level: less is no spike, however quiet the run
_LATELY, _OFTEN = 128, 4  # steps, and rises of one height among them, which make it usual
_ALIKE = 0.5  # of a height: less apart is one height
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

    A spike is kept out of what later losses are compared with; `patience` spikes in a row are a new level, which is taken. A
    height that comes back again and again is a part of the data (a harder source), no spike any more.

    Args:
        window: losses that are looked back on.
        warmup: losses before the first judgement.
        patience: spikes in a row after which the new level is accepted.

    Attributes:
        height: of the loss added last over the level, in deviations; 0 before there is a level. What is high and no spike may
            be due to one bad example among good ones.
    """

    def __init__(self, window: int = 64, warmup: int = 12, patience: int = 20) -> None:
        self._warmup, self._patience = warmup, patience
        self._kept: deque[float] = deque(maxlen=window)
        self._apart: list[float] = []
        self._episodes: deque[tuple[int, float]] = deque(
            maxlen=window
        )  # number and height of each rise above the limit
        self._count = 0
        self.height = 0.0

    def seed(self, values: Iterable[float]) -> None:
        """Take losses of before a resume, to compare with."""
        self._kept.extend(value for value in values if math.isfinite(value))

    def add(self, value: float) -> Spike | None:
        """Take the loss of a step; a spike if it is one. A loss that is not finite is one and never kept."""
        self.height = 0.0
        self._count += 1
        spike = self._judge(value)
        if spike is not None and math.isfinite(value) and self._is_usual(spike):
            spike = None
        if spike is None:
            self._kept.append(value)
            self._apart.clear()
            return None
        if math.isfinite(value):
            self._apart.append(value)
            if len(self._apart) >= self._patience:
                self._kept.clear()
                self._kept.extend(self._apart)
                self._apart.clear()
        return spike

    def _is_usual(self, spike: Spike) -> bool:
        """Whether rises of about this height came several times lately, each after losses that were none."""
        height = spike.value - spike.level
        lately = [seen for at, seen in self._episodes if at > self._count - _LATELY]
        usual = sum(abs(seen - height) <= _ALIKE * height for seen in lately) >= _OFTEN
        if not self._apart:
            self._episodes.append((self._count, height))
        return usual and not self._apart

    def _judge(self, value: float) -> Spike | None:
        if not math.isfinite(value):
            return Spike(value, median(self._kept) if self._kept else math.nan, math.inf, math.inf)
        if len(self._kept) < _FEW:
            return None
        # Of so few values Python's own median is ten times as fast as NumPy's.
        kept = list(self._kept)
        level, middle, lately = median(kept[-16:]), median(kept), median(kept[-32:])
        if abs(level) < _NONE:
            return None  # a tenth of nothing is no measure
        noise = MAD * median(abs(b - a) for a, b in pairwise(kept)) / math.sqrt(2)
        # Losses whose low outliers reach further than normal ones have high outliers that do, too.
        low = (lately - min(kept[-32:])) / max(noise, 1e-12)
        tail = min(max(low / _LOWEST_OF_64, 1.0), 2.0)
        # On the way down the values before lie above: their spread is no reason to look away.
        around = 0.0 if kept[-1] < middle else MAD * median(abs(one - middle) for one in kept) / 2
        deviation = max(noise, around, 1e-12)
        limit = level + max(_DEVIATIONS * tail * deviation, _SHARE * abs(level))
        self.height = (value - level) / deviation
        judged = len(kept) >= self._warmup
        return Spike(value, level, limit, self.height) if judged and value > limit else None
