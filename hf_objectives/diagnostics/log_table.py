"""Turn log lines, in the order in which they were written, into one series per curve."""

from __future__ import annotations

import math
from array import array
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hf_objectives.diagnostics.log_names import RUN_KEYS, STAND_INS, canonical, is_curve, of_split, split_of, step_of

_SUMMARY = "train_runtime"  # stands in the Trainer's last line, whose train_loss is the mean over the whole run
_Line = Mapping[str, Any]
_Flags = NDArray[np.bool_]


class Series(NamedTuple):
    """One curve: `steps` int64 [points], rising, and `values` float64 [points], which may hold NaN and infinities."""

    steps: NDArray[np.int64]
    values: NDArray[np.float64]


class _Column(NamedTuple):
    """The numbers under one key, with the lines that they stand in. A NaN that was logged is one, a missing value is none."""

    key: str
    lines: array[int]
    values: array[float]


class LogTable:
    """Collects the log lines of one run column by column, and gives them as curves."""

    def __init__(self) -> None:
        self._steps = array("d")  # of every line; NaN where it names none
        self._columns: dict[str, dict[str, _Column]] = defaultdict(dict)  # by curve, then by key
        self._layouts: dict[tuple[tuple[Any, ...], str | None], list[_Column]] = {}
        self._stepless = 0
        self._no_numbers: dict[str, list[str]] = defaultdict(list)
        self._no_text: dict[str, None] = {}  # keys, in order

    def add(self, line: _Line) -> None:
        """Add a line. What a key means depends on those beside it."""
        keys = tuple(line)
        step_key, split_key = step_of(keys), split_of(keys)
        split = line[split_key] if split_key is not None else None
        if not isinstance(split, str) or not split.strip() or split.strip().isdigit():
            split = None  # a number or a blank names none
        if (layout := self._layouts.get((keys, split))) is None:
            layout = self._layouts[keys, split] = self._layout(keys, split)
        number = len(self._steps)
        self._steps.append(math.nan)
        if step_key is None:
            self._stepless += 1
            return
        try:
            self._steps[number] = float(line[step_key])
        except (TypeError, ValueError, OverflowError):
            self._refuse(step_key, line[step_key])
        for key, lines, values in layout:
            try:
                values.append(float(line[key]))
                lines.append(number)
            except (TypeError, ValueError, OverflowError):
                self._refuse(key, line[key])

    def _layout(self, keys: tuple[Any, ...], split: str | None) -> list[_Column]:
        """The columns that lines with these keys belong to."""
        self._no_text |= {repr(key): None for key in keys if not isinstance(key, str)}
        is_summary = any(isinstance(key, str) and key.endswith(_SUMMARY) for key in keys)
        layout = []
        for key in keys:
            if is_curve(key) and not (is_summary and key == "train_loss"):
                name = canonical(key) if split is None else of_split(key, split)
                layout.append(self._columns[name].setdefault(key, _Column(key, array("q"), array("d"))))
        return layout

    def _refuse(self, key: str, value: Any) -> None:
        if value is not None and not (isinstance(value, str) and not value.strip()):
            self._no_numbers[key].append(repr(value)[:60])

    def curves(self) -> tuple[dict[str, Series], list[str], list[int]]:
        """The curves, a sentence about each thing that was left out or put right, and the steps of resumes."""
        steps = np.array(self._steps)
        valid = np.isfinite(steps) & (steps >= 0) & (steps < 2**53)
        stray, rewritten = np.zeros(len(steps), bool), np.zeros(len(steps), bool)
        series: dict[str, Series] = {}
        resumes: dict[str, list[int]] = {}
        columns = self._named()
        for name in sorted(columns, key=lambda name: name != "loss"):  # the loss first
            lines = np.concatenate([np.array(column.lines) for column in columns[name]])
            order = np.argsort(lines, kind="stable")
            order = order[valid[lines[order]]]
            values = np.concatenate([np.array(column.values) for column in columns[name]])[order]
            lines = lines[order]
            points = steps[lines].astype(np.int64)
            # Training that never went back was not resumed: evaluations behind it come late, or from an older checkpoint.
            straight = "loss" in series and len(series["loss"].steps) > 1 and not resumes["loss"]
            is_stray, is_rewritten, resumes[name] = _going_back(points, may_resume=not straight)
            stray[lines[is_stray]], rewritten[lines[is_rewritten]] = True, True
            kept = np.flatnonzero(~is_stray & ~is_rewritten)
            kept = kept[np.argsort(points[kept], kind="stable")]
            kept = kept[np.append(np.diff(points[kept]) > 0, True)[: len(kept)]]  # at one step the later line counts
            if len(kept):
                series[name] = Series(points[kept], values[kept])
        # A resume shows in every curve, in each at its own step.
        resumed = [name for name in series if resumes[name]]
        longest = max(resumed, key=lambda name: (name == "loss", len(series[name].steps)), default=None)
        seams = resumes[longest] if longest else []
        notes = self._notes(steps, valid, stray, rewritten, seams)
        return {name: series[name] for name in columns if name in series}, notes, seams

    def _named(self) -> dict[str, list[_Column]]:
        """The columns of each curve. Where there is no other, a mean over the run is the loss, a test set the evaluation."""
        points = {name: sum(len(column.values) for column in self._columns[name].values()) for name in self._columns}
        named: dict[str, list[_Column]] = {}
        for name, columns in self._columns.items():
            usual = STAND_INS.get(name, name)
            stands_in = not points.get(usual) and (points[name] > 1 or usual != "loss")
            if points[name]:
                named[usual if stands_in else name] = list(columns.values())
        return named

    def _notes(
        self, steps: NDArray[np.float64], valid: _Flags, stray: _Flags, rewritten: _Flags, seams: list[int]
    ) -> list[str]:
        notes = []
        if self._no_text:
            notes.append(f"keys that are no text were left out: {', '.join(list(self._no_text)[:5])}")
        if self._stepless:
            notes.append(
                f"{self._stepless:,} of {len(steps):,} lines name no step and were left out; expected one of step, "
                "global_step, iteration"
            )
        for key, odd in self._no_numbers.items():
            notes.append(f"{key}: {len(odd):,} values that are no numbers were left out, the first {odd[0]}")
        for name, columns in self._columns.items():
            keys = sorted(key for key, column in columns.items() if column.values)
            if len(keys) > 1:
                notes.append(f"{name} was read from {' and '.join(keys)}; at one step the later line counts")
        if bad_steps := int((~valid).sum()) - self._stepless:
            notes.append(f"{bad_steps:,} lines have a step that is no number from 0 on and were left out")
        if stray.any():
            first = f"{steps[int(stray.argmax())]:.0f}"
            notes.append(f"{stray.sum():,} lines with a step out of order were left out, the first at step {first}")
        if seams:
            shown = ", ".join(f"{seam:,}" for seam in seams[:5]) + (" ..." if len(seams) > 5 else "")
            notes.append(
                f"steps go back to {shown}: read as {len(seams)} resumed run{'s' if len(seams) > 1 else ''}; "
                f"{rewritten.sum():,} lines of steps that were written again later were left out"
            )
        return notes


def tables_by_run(lines: Iterable[_Line]) -> dict[str, LogTable]:
    """One table for each run that the lines name in a column, in the order written; "" where they name none.

    A line that names no run belongs to the run before it, and lines before the first name belong to the first run.
    """
    tables: dict[str, LogTable] = defaultdict(LogTable)
    current = ""
    for line in lines:
        run = line[RUN_KEYS[0]] if RUN_KEYS[0] in line else line.get(RUN_KEYS[1], "")
        if run != current and isinstance(run, (str, int)) and run != "":
            current = str(run)
            if "" in tables:
                tables[current] = tables.pop("")
        tables[current].add(line)
    return tables or {"": LogTable()}


def _going_back(steps: NDArray[np.int64], *, may_resume: bool) -> tuple[_Flags, _Flags, list[int]]:
    """Find where the steps of a curve go back: strays, points that were written again, and the first steps of resumed runs.

    A stray is one step that lies before its neighbours, which go on. Example of a resume: after steps 10 20 30 a run writes
    20 30 40. The first 20 and 30 were written again; what was written last counts.
    """
    stray, rewritten = np.zeros(len(steps), bool), np.zeros(len(steps), bool)
    stray[1:-1] = (steps[1:-1] < steps[:-2]) & (steps[2:] > steps[:-2])
    if not may_resume or not len(steps):
        return stray, rewritten, []
    rest = steps[~stray]
    starts = np.append(np.where(np.diff(rest) < 0, rest[1:], np.inf), np.inf)  # of the run that begins behind a point
    rewritten[~stray] = rest >= np.minimum.accumulate(starts[::-1])[::-1]
    return stray, rewritten, sorted({int(start) for start in starts[np.isfinite(starts)]})
