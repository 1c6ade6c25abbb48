"""Log lines, in the order they were written, into one array per curve: names unified, resumed runs put in order."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hf_objectives.diagnostics.log_names import RUN_KEYS, STAND_INS, canonical, is_curve, of_split, split_of, step_of

_AT_ONCE = 50_000  # lines; bounds what is held as Python objects
_SUMMARY = "train_runtime"  # in the Trainer's last line, whose train_loss is the mean over the whole run
_Part = tuple[NDArray[np.int64], NDArray[np.float64]]  # lines and their values


class Series(NamedTuple):
    """One curve: `steps` int64 [points], rising, and `values` float64 [points], which may hold NaN and infinities."""

    steps: NDArray[np.int64]
    values: NDArray[np.float64]


class LogTable:
    """Collects log lines column by column, and gives them as curves."""

    def __init__(self) -> None:
        self._entries: list[NDArray[np.float64]] = []  # the step of every line
        self._columns: dict[str, list[_Part]] = defaultdict(list)
        self._count = 0
        self._stepless = 0
        self._odd: Counter[str] = Counter()
        self._example: dict[str, str] = {}
        self._no_text: dict[str, None] = {}  # keys, in order
        self._spellings: dict[str, set[str]] = defaultdict(set)

    def extend(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Take lines in the order in which they were written."""
        rest = iter(lines)
        while batch := list(islice(rest, _AT_ONCE)):
            groups: dict[tuple[str, ...], list[int]] = defaultdict(list)
            for i, line in enumerate(batch):
                groups[tuple(line)].append(i)
            steps = np.full(len(batch), np.nan)
            for keys, where in groups.items():
                self._no_text |= {repr(key): None for key in keys if not isinstance(key, str)}
                step_key = step_of(keys)
                if step_key is None:
                    self._stepless += len(where)
                    continue
                for split, which in _by_split(batch, split_of(keys), where).items():
                    index = np.array(which)
                    steps[index], _ = self._numbers([batch[i][step_key] for i in which], step_key)
                    for key in keys:
                        if is_curve(key) and not _is_summary(key, keys):
                            name = canonical(key) if split is None else of_split(key, split)
                            self._take(name, key, index, [batch[i][key] for i in which])
            self._entries.append(steps)
            self._count += len(batch)

    def append(self, other: LogTable) -> None:
        """Take the lines of another table after its own."""
        self._entries += other._entries
        for name, parts in other._columns.items():
            self._columns[name] += [(index + self._count, values) for index, values in parts]
            self._spellings[name] |= other._spellings[name]
        self._count += other._count
        self._stepless += other._stepless
        self._odd += other._odd
        self._example = {**other._example, **self._example}
        self._no_text |= other._no_text

    def _take(self, name: str, key: str, index: NDArray[np.int64], values: list[Any]) -> None:
        numbers, given = self._numbers(values, key)
        if given.any():
            self._spellings[name].add(key)
            self._columns[name].append((self._count + index[given], numbers[given]))

    def _numbers(self, values: list[Any], key: str) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """The values as numbers, and which of them are: a NaN that the log holds is one, a missing value is none."""
        try:
            if isinstance(values[0], str):  # of a CSV; NumPy is slower at text
                numbers = np.fromiter(map(float, values), np.float64, len(values))
            else:
                numbers = np.array(values, dtype=np.float64)
        except (TypeError, ValueError, OverflowError):
            numbers = np.zeros((0, 0))
        if numbers.ndim == 1:
            given = np.ones(len(values), bool)
            given[[i for i in np.flatnonzero(np.isnan(numbers)) if values[i] is None]] = False
            return numbers, given
        numbers, given = np.full(len(values), np.nan), np.zeros(len(values), bool)
        for i, value in enumerate(values):
            if value is None or (isinstance(value, str) and not value.strip()):
                continue
            try:
                numbers[i] = float(value)
                given[i] = True
            except (TypeError, ValueError, OverflowError):
                self._odd[key] += 1
                self._example.setdefault(key, repr(value)[:60])
        return numbers, given

    def curves(self) -> tuple[dict[str, Series], list[str], list[int]]:
        """The curves, what was left out or put right (a sentence each), and the steps at which a run was resumed."""
        notes = self._left_out()
        steps = np.concatenate(self._entries) if self._entries else np.zeros(0)
        whole = np.isfinite(steps) & (steps >= 0) & (steps < 2**53)
        if odd := int((~whole).sum()) - self._stepless:
            notes.append(f"{odd:,} lines have a step that is no number from 0 on and were left out")
        stray, again = np.zeros(len(steps), bool), np.zeros(len(steps), bool)
        series: dict[str, Series] = {}
        seams: dict[str, list[int]] = {}
        columns = self._named()
        for name in sorted(columns, key=lambda name: name != "loss"):  # the loss first
            index, values = _in_line(columns[name])
            usable = whole[index]
            index, values = index[usable], values[usable]
            at = steps[index].astype(np.int64)
            # Where training did not go back nothing was resumed: an older checkpoint was evaluated, or it came late.
            straight = "loss" in series and len(series["loss"].steps) > 1 and not seams["loss"]
            out, rewritten, seams[name] = _going_back(at, may_resume=not straight)
            stray[index[out]], again[index[rewritten]] = True, True
            if len(out) or len(rewritten):
                left_out = np.append(out, rewritten)
                at, values = np.delete(at, left_out), np.delete(values, left_out)
            if (np.diff(at) < 0).any():
                order = np.argsort(at, kind="stable")
                at, values = at[order], values[order]
            if len(at):
                last = np.append(np.diff(at) > 0, True)
                series[name] = Series(at[last], values[last])
        # One resume shows in every curve, each at its own step.
        resumed = [name for name in series if seams[name]]
        shown = max(resumed, key=lambda name: (name == "loss", len(series[name].steps)), default=None)
        seam = seams[shown] if shown else []
        ordered = {name: series[name] for name in columns if name in series}
        return ordered, notes + _said(steps, stray, again, seam), seam

    def _named(self) -> dict[str, list[_Part]]:
        """The columns; a mean over the run is the loss, and a test set the evaluation, where there is no other."""
        columns: dict[str, list[_Part]] = {}
        for name, parts in self._columns.items():
            usual = STAND_INS.get(name)
            points = sum(len(index) for index, _ in parts)
            stands_in = usual and usual not in self._columns and (points > 1 or usual != "loss")
            columns[usual if stands_in and usual else name] = parts
        return columns

    def _left_out(self) -> list[str]:
        notes = []
        if self._no_text:
            notes.append(f"keys that are no text were left out: {', '.join(list(self._no_text)[:5])}")
        if self._stepless:
            notes.append(
                f"{self._stepless:,} of {self._count:,} lines name no step and were left out; expected one of step, "
                "global_step, iteration"
            )
        for key, count in self._odd.items():
            notes.append(f"{key}: {count:,} values that are no numbers were left out, the first {self._example[key]}")
        for name, spellings in self._spellings.items():
            if len(spellings) > 1:
                notes.append(
                    f"{name} was read from {' and '.join(sorted(spellings))}; at one step the later line counts"
                )
        return notes


def tables_by_run(lines: Iterable[Mapping[str, Any]]) -> dict[str, LogTable]:
    """One table for each run that the lines name in a column, or one under "" where that makes no difference.

    Args:
        lines: log lines in the order in which they were written; one that names no run belongs to the run before it.
    """
    tables: dict[str, LogTable] = {}
    name = ""
    rest = iter(lines)
    while batch := list(islice(rest, _AT_ONCE)):
        if not any(key in line for line in batch for key in RUN_KEYS):
            tables.setdefault(name, LogTable()).extend(batch)
            continue
        runs: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
        for line in batch:
            said = line[RUN_KEYS[0]] if RUN_KEYS[0] in line else line.get(RUN_KEYS[1])
            if said != name and isinstance(said, (str, int)) and said != "" and str(said) != name:
                if not name:  # what came before the first name
                    before = tables.pop("", None)
                    runs = defaultdict(list, {str(said): runs.pop("", [])})
                    if before:
                        tables[str(said)] = before
                name = str(said)
            runs[name].append(line)
        for run, some in runs.items():
            tables.setdefault(run, LogTable()).extend(some)
    return tables if len(tables) > 1 else {"": next(iter(tables.values()), LogTable())}


def _by_split(batch: list[Mapping[str, Any]], key: str | None, where: list[int]) -> dict[str | None, list[int]]:
    """Lines by the split that they name; a number names none."""
    if key is None:
        return {None: where}
    said: dict[str, list[int]] = defaultdict(list)
    for i in where:
        value = batch[i][key]
        said[value if isinstance(value, str) else ""].append(i)
    parts: dict[str | None, list[int]] = defaultdict(list)
    for value, which in said.items():
        parts[None if not value.strip() or value.strip().isdigit() else value] += which
    return parts


def _is_summary(key: str, keys: tuple[str, ...]) -> bool:
    return key == "train_loss" and any(isinstance(other, str) and other.endswith(_SUMMARY) for other in keys)


def _in_line(parts: list[_Part]) -> _Part:
    """The parts of a column as one, in the order in which the lines were written."""
    index, values = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
    if (np.diff(index) < 0).any():  # lines of unlike keys were taken apart
        order = np.argsort(index, kind="stable")
        index, values = index[order], values[order]
    return index, values


def _going_back(
    steps: NDArray[np.int64], *, may_resume: bool
) -> tuple[NDArray[np.int64], NDArray[np.int64], list[int]]:
    """Where steps go back: points that are strays, points that a resumed run wrote again later, and its first steps.

    A point whose step lies below both neighbours, which go on, is a stray. A resumed run writes steps again, and what it
    wrote last is the run.
    """
    nothing = np.zeros(0, np.int64)
    back = np.flatnonzero(np.diff(steps) < 0) + 1
    if not len(back):
        return nothing, nothing, []
    inner = back[back < len(steps) - 1]
    stray = inner[steps[inner + 1] > steps[inner - 1]]
    if not may_resume:
        return stray, nothing, []
    rest = np.delete(np.arange(len(steps)), stray)
    left = steps[rest]
    starts = np.flatnonzero(np.diff(left) < 0) + 1
    # From which step on what comes later was written again; nothing after the last start.
    since = np.append(np.minimum.accumulate(left[starts][::-1])[::-1], np.iinfo(np.int64).max)
    again = rest[left >= since[np.searchsorted(starts, np.arange(len(left)), side="right")]]
    return stray, again, sorted(set(left[starts].tolist()))


def _said(
    steps: NDArray[np.float64], stray: NDArray[np.bool_], again: NDArray[np.bool_], seams: list[int]
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
            f"{int(again.sum()):,} lines of steps that were written again later were left out"
        )
    return notes
