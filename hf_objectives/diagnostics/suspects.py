"""Find the examples whose loss is far from what is usual for their source, and the rows to leave out of training."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from hf_objectives.diagnostics.batch_record import to_json
from hf_objectives.errors import FileFormatError
from hf_objectives.types import parse_json

SUSPECTS, BLOCKLIST = "suspects.jsonl", "blocklist.json"
_KNOWN = 256  # losses of examples that are remembered of each source
_ENOUGH = 32  # of them; with fewer, an example is compared with its batch as well
_FAR = 6.0  # robust deviations
_LEAST = 5  # losses to compare with
Blocked = dict[str, set[int]]


class Suspects:
    """Compares examples with others of their source, and keeps the rows of those that stand out.

    A row is blocked only where its step alone stands out. Where step after step does, the run has gone wrong as a whole, and
    its rows are innocent.

    Attributes:
        blocked: rows by source.
    """

    def __init__(self) -> None:
        self.blocked: Blocked = defaultdict(set)
        self._known: dict[Any, deque[float]] = defaultdict(lambda: deque(maxlen=_KNOWN))
        self._waiting: list[tuple[str, int]] = []  # rows of the step before; this step decides about them
        self._apart = False  # they stood out among others of their batch
        self._event_before = self._alone = False

    def judge(self, examples: Sequence[dict[str, Any]], limit: float = math.inf) -> list[dict[str, Any]]:
        """Set each example's distance from its source's usual loss, `deviations`, and `suspect`. Return the suspects.

        Args:
            examples: what `describe_examples` gave, of one step.
            limit: a loss above which an example is suspect in any case.
        """
        for example in examples:
            source, loss = example["source"], example["loss"]
            usual = list(self._known[source])
            if len(usual) < _ENOUGH:
                others = [other for other in examples if other is not example and other["source"] == source]
                usual += [other["loss"] for other in others if other["loss"] is not None]
            example["deviations"] = 0.0 if loss is None else _deviations(loss, usual)
            example["suspect"] = loss is not None and (
                not math.isfinite(loss) or example["deviations"] > _FAR or loss > limit
            )
        for example in examples:
            if not example["suspect"] and example["loss"] is not None:
                self._known[example["source"]].append(example["loss"])
        return [example for example in examples if example["suspect"]]

    def settle(self, event: bool) -> bool:
        """Tell whether this step is an event, before its suspects are taken. Return whether rows were blocked."""
        waiting, self._waiting = self._waiting, []
        self._alone, self._event_before = event and not self._event_before, event
        return not event and self._block(waiting)

    def take(self, suspects: Iterable[Mapping[str, Any]], count: int) -> None:
        """Take the suspects of a step of `count` examples; they are blocked if the next step is no event."""
        if self._event_before and not self._alone:
            return
        self._waiting = [
            (suspect["source"], suspect["row"])
            for suspect in suspects
            if suspect["source"] is not None and suspect["row"] is not None
        ]
        self._apart = len(self._waiting) < count

    def finish(self) -> bool:
        """Where no step follows, block rows that stood out among others of their batch. Return whether there were any."""
        waiting, self._waiting = self._waiting, []
        return self._apart and self._block(waiting)

    def _block(self, rows: Sequence[tuple[str, int]]) -> bool:
        for source, row in rows:
            self.blocked[source].add(row)
        return bool(rows)

    def read(self, path: Path) -> None:
        """Take the rows of a blocklist of a run before a resume, where there is one.

        Raises:
            FileFormatError: it is no blocklist, or damaged.
        """
        if not path.is_file():
            return
        try:
            for source, rows in parse_json(path.read_bytes()).items():
                self.blocked[source].update(row for row in map(int, rows) if row >= 0)
        except (ValueError, TypeError, AttributeError, OverflowError) as error:
            raise FileFormatError(
                f'{path} is no blocklist ({error}); expected {{"source": [rows]}}. Mend or remove it'
            ) from error


def write_blocklist(path: Path, several: Iterable[Blocked]) -> None:
    """Write the rows of one or more ranks, in the form that a mixture takes as its `blocklist`."""
    rows: Blocked = defaultdict(set)
    for blocked in several:
        for source, numbers in blocked.items():
            rows[source] |= numbers
    if rows:
        path.parent.mkdir(parents=True, exist_ok=True)
        ordered = {source: sorted(numbers) for source, numbers in rows.items()}
        path.write_text(to_json(ordered, indent=1), encoding="utf-8")


def _deviations(loss: float, usual: Sequence[float]) -> float:
    """Distance of a loss from the median of the usual ones, in robust standard deviations; 0 where they are too few."""
    values = np.array([value for value in usual if math.isfinite(value)])
    if not math.isfinite(loss):
        return math.inf
    if len(values) < _LEAST:
        return 0.0
    level = float(np.median(values))
    spread = max(float(stats.median_abs_deviation(values, scale="normal")), 0.05 * abs(level), 1e-6)
    return (loss - level) / spread
