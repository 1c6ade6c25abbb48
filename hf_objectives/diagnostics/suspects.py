"""Examples whose loss is far from what is usual for their source: which they are, and which rows to leave out."""

from __future__ import annotations

import json
import math
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hf_objectives.diagnostics.batch_record import to_json
from hf_objectives.diagnostics.robust import MAD
from hf_objectives.errors import FileFormatError

SUSPECTS, BLOCKLIST = "suspects.jsonl", "blocklist.json"
_KNOWN = 256  # losses of examples that are remembered of each source
_ENOUGH = 32  # of them, without which the batch is compared with itself as well
_FAR = 6.0  # robust deviations
_LEAST = 5  # losses to compare with
Blocked = dict[str, set[int]]


class Suspects:
    """Compares examples with others of their source, and keeps the rows of those that stand out.

    A row is blocked only where its event stands alone: rows of a run that has gone wrong as a whole, step after step, are
    innocent.

    Attributes:
        blocked: rows by source.
    """

    def __init__(self) -> None:
        self.blocked: Blocked = defaultdict(set)
        self._known: dict[Any, deque[float]] = defaultdict(lambda: deque(maxlen=_KNOWN))
        self._waiting: list[tuple[str, int]] = []  # rows of the step before, which this one will tell of
        self._apart = False  # they stood out among others of their batch
        self._event_before = self._alone = False

    def judge(self, examples: Sequence[dict[str, Any]], limit: float = math.inf) -> list[dict[str, Any]]:
        """Mark each example with its distance from its source's usual loss, `deviations`, and `suspect`; gives the suspects.

        Args:
            examples: what `describe_examples` gave, of one step.
            limit: a loss above which an example is suspect in any case.
        """
        for one in examples:
            # With a short history of its source, the batch itself says what is usual, too.
            known = list(self._known[one["source"]])
            beside = [other["loss"] for other in examples if other is not one and other["source"] == one["source"]]
            usual = known if len(known) >= _ENOUGH else known[-_ENOUGH:] + [loss for loss in beside if loss is not None]
            loss = math.nan if one["loss"] is None else one["loss"]
            one["deviations"] = 0.0 if one["loss"] is None else _deviations(loss, usual)
            one["suspect"] = one["loss"] is not None and (
                not math.isfinite(loss) or one["deviations"] > _FAR or loss > limit
            )
        for one in examples:
            if not one["suspect"] and one["loss"] is not None:
                self._known[one["source"]].append(one["loss"])
        return [one for one in examples if one["suspect"]]

    def settle(self, event: bool) -> bool:
        """Tell whether the step now is an event itself, before its suspects are taken; whether rows were blocked."""
        waiting, self._waiting = self._waiting, []
        blocked = bool(waiting) and not event
        if blocked:
            self._block(waiting)
        self._alone, self._event_before = event and not self._event_before, event
        return blocked

    def take(self, suspects: Iterable[Mapping[str, Any]], of: int) -> None:
        """Rows of suspects, out of `of` examples, to be blocked if the next step is none that stands out."""
        if self._event_before and not self._alone:
            return
        named = [one for one in suspects if one["source"] is not None and one["row"] is not None]
        self._waiting = [(one["source"], one["row"]) for one in named]
        self._apart = len(named) < of

    def finish(self) -> bool:
        """Where no step follows, rows that stood out among others of their batch are blocked; whether there were any."""
        waiting, self._waiting = self._waiting, []
        self._block(waiting if self._apart else [])
        return bool(waiting) and self._apart

    def _block(self, rows: Iterable[tuple[str, int]]) -> None:
        for source, row in rows:
            self.blocked[source].add(row)

    def read(self, path: Path) -> None:
        """Take the rows of a blocklist that is there already, of a run before a resume.

        Raises:
            FileFormatError: it is no blocklist, or damaged.
        """
        if not path.is_file():
            return
        try:
            for source, rows in json.loads(path.read_text(encoding="utf-8")).items():
                self.blocked[source].update(row for row in map(int, rows) if row >= 0)
        except (ValueError, TypeError, AttributeError) as error:
            raise FileFormatError(
                f'{path} is no blocklist ({error}); expected {{"source": [rows]}}. Mend or remove it'
            ) from error


def write_blocklist(path: Path, several: Iterable[Blocked]) -> None:
    """Write the rows of one or more ranks, as a mixture takes them as its `blocklist`."""
    rows: Blocked = defaultdict(set)
    for blocked in several:
        for source, numbers in blocked.items():
            rows[source] |= numbers
    if rows:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            to_json({source: sorted(numbers) for source, numbers in rows.items()}, indent=1), encoding="utf-8"
        )


def _deviations(loss: float, usual: Sequence[float]) -> float:
    values = np.array([value for value in usual if math.isfinite(value)])
    if not math.isfinite(loss):
        return math.inf
    if len(values) < _LEAST:
        return 0.0
    level = float(np.median(values))
    spread = max(MAD * float(np.median(np.abs(values - level))), 0.05 * abs(level), 1e-6)
    return (loss - level) / spread
