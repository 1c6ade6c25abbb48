"""Log lines, in the order they were written, into one array per curve: names unified, resumed runs put in order."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

_AT_ONCE = 50_000  # lines; bounds what is held as Python objects
#: Names of the step, best first: a tracker's own counter comes after the step that the trainer gave it.
STEP_KEYS = ("train/global_step", "global_step", "step", "Step", "iteration", "iter", "_step", "steps")
_NAMES = {
    **dict.fromkeys(("train_loss", "training_loss", "Loss"), "loss"),
    **dict.fromkeys(("val_loss", "valid_loss", "validation_loss", "eval/loss"), "eval_loss"),
    **dict.fromkeys(("lr", "learning-rate"), "learning_rate"),
    **dict.fromkeys(("gradient_norm", "grad-norm"), "grad_norm"),
}
_PREFIXES = (("train/", ""), ("eval/", "eval_"), ("val/", "eval_"), ("valid/", "eval_"), ("validation/", "eval_"))
_SUMMARY = "train_runtime"  # in the Trainer's last line, whose train_loss is the mean over the whole run
_WORDS = frozenset(("timestamp", "_timestamp", "_runtime", "time", "date", "run", "run_name", "split", "phase"))


class Series(NamedTuple):
    """One curve: `steps` int64 [points], rising, and `values` float64 [points], which may hold NaN and infinities."""

    steps: NDArray[np.int64]
    values: NDArray[np.float64]


def canonical(key: str) -> str:
    """A key under the Trainer's name for it: val_loss and eval/loss are eval_loss, train/loss is loss."""
    if key in _NAMES:
        return _NAMES[key]
    for prefix, ours in _PREFIXES:
        if key.startswith(prefix):
            name = ours + key.removeprefix(prefix)
            return _NAMES.get(name, name)
    return key


class LogTable:
    """Collects log lines column by column, and gives them as curves."""

    def __init__(self) -> None:
        self._entries: list[NDArray[np.float64]] = []  # the step of every line
        self._columns: dict[str, list[tuple[NDArray[np.int64], NDArray[np.float64]]]] = defaultdict(list)
        self._count = 0
        self._stepless = 0
        self._odd: Counter[str] = Counter()
        self._example: dict[str, str] = {}
        self._unread: NDArray[np.bool_] = np.zeros(0, bool)  # of the values read last
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
                step_key = next((key for key in STEP_KEYS if key in keys), None)
                if step_key is None:
                    self._stepless += len(where)
                    continue
                index = np.array(where)
                steps[index] = self._numbers([batch[i][step_key] for i in where], step_key)
                for key in keys:
                    if key != step_key and key not in STEP_KEYS and key not in _WORDS:
                        self._take(key, keys, index, [batch[i][key] for i in where])
            self._entries.append(steps)
            self._count += len(batch)

    def extend_series(self, key: str, steps: Sequence[float], values: Sequence[float]) -> None:
        """Take a whole curve, in the order in which it was written."""
        self._entries.append(np.asarray(steps, dtype=np.float64))
        self._columns[canonical(key)].append(
            (self._count + np.arange(len(steps)), np.asarray(values, dtype=np.float64))
        )
        self._count += len(steps)

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

    def _take(self, key: str, keys: tuple[str, ...], index: NDArray[np.int64], values: list[Any]) -> None:
        if key == "train_loss" and _SUMMARY in keys:
            return
        name = canonical(key)
        numbers = self._numbers(values, key)
        given = np.fromiter((value is not None and value != "" for value in values), bool, len(values))
        # What is no number became NaN with a note; a NaN that the log holds stays one.
        given &= ~self._unread
        if given.any():
            self._spellings[name].add(key)
            self._columns[name].append((self._count + index[given], numbers[given]))

    def _numbers(self, values: list[Any], key: str) -> NDArray[np.float64]:
        self._unread = np.zeros(len(values), bool)
        try:
            return np.array(values, dtype=np.float64)
        except (TypeError, ValueError, OverflowError):
            numbers = np.full(len(values), np.nan)
        for i, value in enumerate(values):
            try:
                numbers[i] = float(value) if value is not None and value != "" else np.nan
            except (TypeError, ValueError, OverflowError):
                self._unread[i] = True
                self._odd[key] += 1
                self._example.setdefault(key, repr(value)[:60])
        return numbers

    def curves(self) -> tuple[dict[str, Series], list[str], list[int]]:
        """The curves, what was left out or put right (a sentence each), and the steps at which a run was resumed."""
        notes = []
        if self._stepless:
            notes.append(
                f"{self._stepless:,} of {self._count:,} lines name no step and were left out; expected one of "
                f"{', '.join(STEP_KEYS[1:4])}"
            )
        for key, count in self._odd.items():
            notes.append(f"{key}: {count:,} values that are no numbers were left out, the first {self._example[key]}")
        for name, spellings in self._spellings.items():
            if len(spellings) > 1:
                notes.append(
                    f"{name} was read from {' and '.join(sorted(spellings))}; at one step the later line counts"
                )
        steps = np.concatenate(self._entries) if self._entries else np.zeros(0)
        whole = np.isfinite(steps) & (steps >= 0) & (steps < 2**53)
        if odd := int((~whole).sum()) - self._stepless:
            notes.append(f"{odd:,} lines have a step that is no number from 0 on and were left out")
        keep, seams, said = _in_order(steps, whole)
        series = {}
        for name, parts in self._columns.items():
            index = np.concatenate([part[0] for part in parts])
            values = np.concatenate([part[1] for part in parts])
            kept = keep[index]
            index, values = index[kept], values[kept]
            at = steps[index].astype(np.int64)
            order = np.argsort(at, kind="stable") if (np.diff(at) < 0).any() else np.arange(len(at))
            at, values = at[order], values[order]
            last = np.append(np.diff(at) > 0, True)[: len(at)]
            if len(at):
                series[name] = Series(at[last], values[last])
        return series, notes + said, seams


def _in_order(steps: NDArray[np.float64], whole: NDArray[np.bool_]) -> tuple[NDArray[np.bool_], list[int], list[str]]:
    """Which lines count where steps go back: a resumed run writes steps again, and what it wrote last is the run."""
    keep = whole.copy()
    at = np.flatnonzero(whole)
    s = steps[at]
    notes: list[str] = []
    if len(s) < 2 or (np.diff(s) >= 0).all():
        return keep, [], notes
    # One line whose step lies below both neighbours, which go on, is a stray line and no resumed run.
    back = np.flatnonzero(np.diff(s) < 0) + 1
    following = np.append(s[1:], np.inf)
    stray = back[following[back] > s[back - 1]]
    stray = stray[stray < len(s) - 1]
    if len(stray):
        keep[at[stray]] = False
        notes.append(
            f"{len(stray):,} lines with a step out of order were left out, the first at step {s[stray[0]]:.0f}"
        )
        at = np.delete(at, stray)
        s = steps[at]
    later = np.append(np.minimum.accumulate(s[::-1])[::-1][1:], np.inf)
    written_again = s > later
    keep[at[written_again]] = False
    seams = sorted({int(s[i]) for i in np.flatnonzero(np.diff(s) < 0) + 1})
    if seams:
        shown = ", ".join(f"{seam:,}" for seam in seams[:5]) + (" ..." if len(seams) > 5 else "")
        notes.append(
            f"steps go back to {shown}: read as {len(seams)} resumed run{'s' if len(seams) > 1 else ''}; "
            f"{int(written_again.sum()):,} lines of steps that were written again later were left out"
        )
    return keep, seams, notes
