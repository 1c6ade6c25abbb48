"""Turn log lines, in the order in which they were written, into one series per curve."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hf_objectives.diagnostics.log_names import RUN_KEYS, STAND_INS, canonical, is_curve, of_split, split_of, step_of

_AT_ONCE = 50_000  # lines; bounds what is held as Python objects
_SUMMARY = "train_runtime"  # stands in the Trainer's last line, whose train_loss is the mean over the whole run
_Line = Mapping[str, Any]
_Column = tuple[NDArray[np.int64], NDArray[np.float64]]  # numbers of lines, and their values


class Series(NamedTuple):
    """One curve: `steps` int64 [points], rising, and `values` float64 [points], which may hold NaN and infinities."""

    steps: NDArray[np.int64]
    values: NDArray[np.float64]


class LogTable:
    """Collects the log lines of one run column by column, and gives them as curves."""

    def __init__(self) -> None:
        self._steps: list[NDArray[np.float64]] = []  # of every line; NaN where it names none
        self._columns: dict[str, list[_Column]] = defaultdict(list)
        self._spellings: dict[str, set[str]] = defaultdict(set)
        self._count = 0
        self._stepless = 0
        self._no_numbers: dict[str, list[str]] = defaultdict(list)
        self._no_text: dict[str, None] = {}  # keys, in order

    def extend(self, lines: Iterable[_Line]) -> None:
        """Add lines. Lines with the same keys are taken together: what a key means depends on those beside it."""
        rest = iter(lines)
        while batch := list(islice(rest, _AT_ONCE)):
            groups: dict[tuple[Any, ...], list[int]] = defaultdict(list)
            for i, line in enumerate(batch):
                groups[tuple(line)].append(i)
            steps = np.full(len(batch), np.nan)
            for keys, group in groups.items():
                self._no_text |= {repr(key): None for key in keys if not isinstance(key, str)}
                if (step_key := step_of(keys)) is None:
                    self._stepless += len(group)
                    continue
                steps[group], _ = self._numbers(step_key, [batch[i][step_key] for i in group])
                for split, rows in _by_split(batch, split_of(keys), group).items():
                    self._add(batch, keys, split, rows)
            self._steps.append(steps)
            self._count += len(batch)

    def _add(self, batch: Sequence[_Line], keys: tuple[Any, ...], split: str | None, rows: list[int]) -> None:
        is_summary = any(isinstance(key, str) and key.endswith(_SUMMARY) for key in keys)
        for key in keys:
            if not is_curve(key) or (is_summary and key == "train_loss"):
                continue
            numbers, given = self._numbers(key, [batch[i][key] for i in rows])
            if given.any():
                name = canonical(key) if split is None else of_split(key, split)
                self._spellings[name].add(key)
                self._columns[name].append((self._count + np.array(rows)[given], numbers[given]))

    def _numbers(self, key: str, values: list[Any]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """The values as numbers, and which of them are: a NaN that was logged is one, a missing value is none."""
        try:
            return np.array(list(map(float, values))), np.ones(len(values), bool)
        except (TypeError, ValueError, OverflowError):
            numbers, given = np.full(len(values), np.nan), np.zeros(len(values), bool)
        for i, value in enumerate(values):
            if value is None or (isinstance(value, str) and not value.strip()):
                continue
            try:
                numbers[i], given[i] = float(value), True
            except (TypeError, ValueError, OverflowError):
                self._no_numbers[key].append(repr(value)[:60])
        return numbers, given

    def curves(self) -> tuple[dict[str, Series], list[str], list[int]]:
        """The curves, a sentence about each thing that was left out or put right, and the steps of resumes."""
        steps = np.concatenate(self._steps) if self._steps else np.zeros(0)
        valid = np.isfinite(steps) & (steps >= 0) & (steps < 2**53)
        stray, rewritten = np.zeros(len(steps), bool), np.zeros(len(steps), bool)
        series: dict[str, Series] = {}
        resumes: dict[str, list[int]] = {}
        columns = self._named()
        for name in sorted(columns, key=lambda name: name != "loss"):  # the loss first
            lines, values = map(np.concatenate, zip(*columns[name], strict=True))
            order = np.argsort(lines, kind="stable")
            order = order[valid[lines[order]]]
            lines, values = lines[order], values[order]
            at = steps[lines].astype(np.int64)
            # Training that never went back was not resumed: evaluations behind it come late, or from an older checkpoint.
            straight = "loss" in series and len(series["loss"].steps) > 1 and not resumes["loss"]
            is_stray, is_rewritten, resumes[name] = _going_back(at, may_resume=not straight)
            stray[lines[is_stray]], rewritten[lines[is_rewritten]] = True, True
            kept = np.flatnonzero(~is_stray & ~is_rewritten)
            kept = kept[np.argsort(at[kept], kind="stable")]
            kept = kept[np.append(np.diff(at[kept]) > 0, True)[: len(kept)]]  # at one step the later line counts
            if len(kept):
                series[name] = Series(at[kept], values[kept])
        # A resume shows in every curve, in each at its own step.
        resumed = [name for name in series if resumes[name]]
        longest = max(resumed, key=lambda name: (name == "loss", len(series[name].steps)), default=None)
        seams = resumes[longest] if longest else []
        notes = self._left_out(int((~valid).sum()) - self._stepless) + _order_notes(steps, stray, rewritten, seams)
        return {name: series[name] for name in columns if name in series}, notes, seams

    def _named(self) -> dict[str, list[_Column]]:
        """The columns; a mean over the run is the loss, and a test set the evaluation, where there is no other."""
        columns: dict[str, list[_Column]] = {}
        for name, parts in self._columns.items():
            usual = STAND_INS.get(name, name)
            points = sum(len(lines) for lines, _ in parts)
            stands_in = usual not in self._columns and (points > 1 or usual != "loss")
            columns[usual if stands_in else name] = parts
        return columns

    def _left_out(self, bad_steps: int) -> list[str]:
        notes = []
        if self._no_text:
            notes.append(f"keys that are no text were left out: {', '.join(list(self._no_text)[:5])}")
        if self._stepless:
            notes.append(
                f"{self._stepless:,} of {self._count:,} lines name no step and were left out; expected one of step, "
                "global_step, iteration"
            )
        for key, odd in self._no_numbers.items():
            notes.append(f"{key}: {len(odd):,} values that are no numbers were left out, the first {odd[0]}")
        for name, spellings in self._spellings.items():
            if len(spellings) > 1:
                notes.append(
                    f"{name} was read from {' and '.join(sorted(spellings))}; at one step the later line counts"
                )
        if bad_steps:
            notes.append(f"{bad_steps:,} lines have a step that is no number from 0 on and were left out")
        return notes


def tables_by_run(lines: Iterable[_Line]) -> dict[str, LogTable]:
    """One table for each run that the lines name in a column; "" where they name none.

    Args:
        lines: log lines in the order in which they were written. A line that names no run belongs to the run before it,
            and lines before the first name belong to the first run.
    """
    tables: dict[str, LogTable] = {}
    current = ""
    rest = iter(lines)
    while batch := list(islice(rest, _AT_ONCE)):
        runs: dict[str, list[_Line]] = defaultdict(list)
        for line in batch:
            run = line[RUN_KEYS[0]] if RUN_KEYS[0] in line else line.get(RUN_KEYS[1], "")
            if run != current and isinstance(run, (str, int)) and run != "":
                if "" in runs:
                    runs[str(run)] = runs.pop("")
                if "" in tables:
                    tables[str(run)] = tables.pop("")
                current = str(run)
            runs[current].append(line)
        for name, group in runs.items():
            tables.setdefault(name, LogTable()).extend(group)
    return tables or {"": LogTable()}


def _by_split(batch: Sequence[_Line], key: str | None, rows: list[int]) -> dict[str | None, list[int]]:
    """Lines by the split that they name; a number or a blank names none."""
    if key is None:
        return {None: rows}
    parts: dict[str | None, list[int]] = defaultdict(list)
    for i in rows:
        split = batch[i][key]
        parts[split if isinstance(split, str) and split.strip() and not split.strip().isdigit() else None].append(i)
    return parts


def _going_back(
    steps: NDArray[np.int64], *, may_resume: bool
) -> tuple[NDArray[np.bool_], NDArray[np.bool_], list[int]]:
    """Find where the steps of a curve go back.

    Example: after steps 10 20 30 a run is resumed and writes 20 30 40. The first 20 and 30 were rewritten.

    Returns:
        Which points are strays: one step that lies before its neighbours, which go on. Which points a resumed run wrote
        again later: what was written last counts. And the first step of each resumed run.
    """
    stray, rewritten = np.zeros(len(steps), bool), np.zeros(len(steps), bool)
    stray[1:-1] = (steps[1:-1] < steps[:-2]) & (steps[2:] > steps[:-2])
    if not may_resume or not len(steps):
        return stray, rewritten, []
    rest = steps[~stray]
    starts = np.append(np.where(np.diff(rest) < 0, rest[1:], np.inf), np.inf)  # of the run that begins behind a point
    rewritten[~stray] = rest >= np.minimum.accumulate(starts[::-1])[::-1]
    return stray, rewritten, sorted({int(start) for start in starts[np.isfinite(starts)]})


def _order_notes(
    steps: NDArray[np.float64], stray: NDArray[np.bool_], rewritten: NDArray[np.bool_], seams: list[int]
) -> list[str]:
    notes = []
    if stray.any():
        notes.append(
            f"{int(stray.sum()):,} lines with a step out of order were left out, the first at step "
            f"{steps[int(stray.argmax())]:.0f}"
        )
    if seams:
        shown = ", ".join(f"{seam:,}" for seam in seams[:5]) + (" ..." if len(seams) > 5 else "")
        notes.append(
            f"steps go back to {shown}: read as {len(seams)} resumed run{'s' if len(seams) > 1 else ''}; "
            f"{int(rewritten.sum()):,} lines of steps that were written again later were left out"
        )
    return notes
