"""Tell a spike from noise while a run goes on, from its losses so far."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from itertools import pairwise
from statistics import median
from typing import NamedTuple

from hf_objectives.diagnostics.robust import MAD

_DEVIATIONS = 6.0  # of the noise above the level
_FEW = 4  # losses, from which on the height of the next can be told, if roughly
_NO_LOSS = 1e-4  # nats: a loss that is not there yet, as with sparse rewards, or that is learned
_SHARE = 0.1  # of the level: less is no spike, however quiet the run
_LATELY, _OFTEN = 128, 4  # steps, and rises of one height among them, which make that height usual
_ALIKE = 0.5  # of a height: a smaller difference is none
_LOWEST_OF_64 = 3.2  # standard deviations: the lowest of 64 normal values is higher than that below, 19 times of 20


class Spike(NamedTuple):
    """A loss out of its noise."""

    value: float
    level: float  #: the median of the losses before it
    limit: float  #: the loss from which on it is a spike
    deviations: float  #: its height over the level, in standard deviations of the noise

    @property
    def kind(self) -> str:
        """ "spike", "non_finite", or "example": an example stands out, the loss of the step does not."""
        if math.isnan(self.deviations) and math.isfinite(self.value):
            return "example"
        return "spike" if math.isfinite(self.value) and math.isfinite(self.deviations) else "non_finite"


class SpikeMonitor:
    """Compares each loss with the median and the noise (median absolute difference of neighbours) of those before.

    Later losses are not compared with a spike. After `patience` spikes in a row they are the new level. A height that comes
    back again and again is a part of the data (a harder source), and no spike any more.

    Where `height` (of the last loss over the level, in deviations) is high and no spike, one bad example among good ones may
    be the reason.

    Args:
        window: losses to compare with.
        warmup: losses before the first judgement.
        patience: spikes in a row after which the new level is accepted.
    """

    def __init__(self, window: int = 64, warmup: int = 12, patience: int = 20) -> None:
        self._warmup, self._patience = warmup, patience
        self._kept: deque[float] = deque(maxlen=window)
        self._apart: list[float] = []
        self._rises: deque[tuple[int, float]] = deque(maxlen=window)  # step and height of each
        self._count = 0
        self.height = 0.0  #: 0 before there is a level

    def seed(self, values: Iterable[float]) -> None:
        """Take losses from before a resume, to compare with."""
        self._kept.extend(value for value in values if math.isfinite(value))

    def add(self, value: float) -> Spike | None:
        """Take the loss of a step. Return a spike if it is one; a loss that is not finite always is."""
        self.height = 0.0
        self._count += 1
        spike = self._judge(value)
        finite = math.isfinite(value)
        if spike is None or (finite and self._is_usual(spike)):
            self._kept.append(value)
            self._apart.clear()
            return None
        if finite:
            self._apart.append(value)
        if len(self._apart) >= self._patience:
            self._kept.clear()
            self._kept.extend(self._apart)
            self._apart.clear()
        return spike

    def _is_usual(self, spike: Spike) -> bool:
        """Whether rises of about this height came several times lately, each after losses that were none."""
        if self._apart:
            return False
        height = spike.value - spike.level
        lately = [before for step, before in self._rises if step > self._count - _LATELY]
        self._rises.append((self._count, height))
        return sum(abs(before - height) <= _ALIKE * height for before in lately) >= _OFTEN

    def _judge(self, value: float) -> Spike | None:
        if not math.isfinite(value):
            return Spike(value, median(self._kept) if self._kept else math.nan, math.inf, math.inf)
        if len(self._kept) < _FEW:
            return None
        kept = list(self._kept)  # of so few values Python's own median is ten times as fast as NumPy's
        level, middle, lately = median(kept[-16:]), median(kept), median(kept[-32:])
        if abs(level) < _NO_LOSS:
            return None  # a tenth of nothing is no measure
        noise = MAD * median(abs(b - a) for a, b in pairwise(kept)) / math.sqrt(2)
        # Losses whose low outliers reach further than normal ones have such high outliers, too.
        low = (lately - min(kept[-32:])) / max(noise, 1e-12)
        tail = min(max(low / _LOWEST_OF_64, 1.0), 2.0)
        # In a falling loss the values before lie above. Their spread is no reason to look away.
        around = 0.0 if kept[-1] < middle else MAD * median(abs(loss - middle) for loss in kept) / 2
        deviation = max(noise, around, 1e-12)
        limit = level + max(_DEVIATIONS * tail * deviation, _SHARE * abs(level))
        self.height = (value - level) / deviation
        judged = len(kept) >= self._warmup
        return Spike(value, level, limit, self.height) if judged and value > limit else None
