"""Read the log of a run, whoever wrote it, into one series per curve."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, cast

import numpy as np

from hf_objectives.diagnostics.log_files import STATE, TAGGED, read_lines
from hf_objectives.diagnostics.log_table import LogTable, Series, tables_by_run
from hf_objectives.errors import ConfigError, FileFormatError
from hf_objectives.inspection import visible

Log = Sequence[Mapping[str, Any]]
#: Names of files that may hold a log, the likeliest first.
_PATTERNS = ("*.jsonl", "*.ndjson", "*.csv", "*.tsv", "events.out.tfevents.*", "*.db", "*.sqlite", "*log*.json")
_GLOBAL_STEP = re.compile(rb'"global_step"\s*:\s*(\d+)')
_EMPTY = Series(np.zeros(0, np.int64), np.zeros(0))
_NAMES_SHOWN = 8  # of curves, in a note
_UNIT_TOLERANCE = 0.005  # relative; two spellings of one perplexity agree better than that


@dataclass
class Curves:
    """The log of one run."""

    name: str  #: from its folder or file
    series: dict[str, Series] = field(default_factory=dict)  #: by the Trainer's names: loss, eval_loss, grad_norm, ...
    notes: list[str] = field(default_factory=list)  #: what could not be read or was put right, a sentence each
    seams: list[int] = field(default_factory=list)  #: steps at which the run was resumed
    made: frozenset[str] = frozenset()  #: keys of perplexities that are exp(loss), and not of the log

    def __contains__(self, key: str) -> bool:
        return key in self.series

    def get(self, key: str) -> Series:
        """The curve of that name; an empty one where the log has none."""
        return self.series.get(key, _EMPTY)

    @property
    def points(self) -> int:
        """Points of the longest curve; one point is no curve, and has no course that could be wrong."""
        return max((len(series.steps) for series in self.series.values()), default=0)


OneLog = str | Path | Log | Curves


def read_curves(log: OneLog) -> Curves:
    """Read the log of one run.

    Args:
        log: a `trainer_state.json`, a checkpoint or output folder, a file of JSON lines (the Trainer's keys, or
            `train_loss` and `val_loss`), a CSV, TensorBoard events, trackio's database, or a Trainer's `log_history`.

    Raises:
        FileFormatError: there is no log, nothing in it can be read, or it holds several runs.
        ConfigError: the package that reads it is not installed.
    """
    runs = read_runs(log)
    if len(runs) > 1:
        names = ", ".join(run.name for run in runs[:6])
        raise FileFormatError(f"{log} holds {len(runs)} runs ({names}); expected one here")
    return runs[0]


def read_runs(log: OneLog | Sequence[OneLog] | Mapping[str, OneLog]) -> list[Curves]:
    """Read the logs of one or several runs.

    Args:
        log: what `read_curves` takes, a folder of run folders, or several of these in a list or by name. A `log_history` in
            a list is named for its place: run 1, run 2, ...

    Raises:
        FileFormatError: there is no log, or nothing in it can be read.
        ConfigError: the package that reads it is not installed.
    """
    if isinstance(log, Curves):
        return [log]
    if isinstance(log, (str, Path)):
        return _named_apart(_read_path(Path(log)))
    if isinstance(log, Mapping) and log:
        return [replace(read_curves(entry), name=str(name)) for name, entry in log.items()]
    if not isinstance(log, Sequence):
        raise FileFormatError(f"{log!r:.60} is no log; expected a path, a Trainer's log_history, or several of them")
    several = log and not any(isinstance(entry, Mapping) for entry in log)
    for i, entry in enumerate(log):
        if not isinstance(entry, (Curves, str, Path, Sequence) if several else Mapping):
            raise FileFormatError(
                f"entry {i} of the log is {entry!r:.60}; expected a mapping such as a Trainer's log_history has"
            )
    if several:
        runs: list[Curves] = []
        for i, entry in enumerate(cast(Sequence[OneLog], log)):
            if isinstance(entry, (str, Path)):
                runs += _read_path(Path(entry))
            else:
                found = read_curves(entry)
                runs.append(found if entry is found else replace(found, name=f"run {i + 1}"))
        return _named_apart(runs)
    return _named_apart(_runs_of(cast(Log, log), "the log"))


def _read_path(path: Path) -> list[Curves]:
    if not path.exists():
        raise FileFormatError(f"no log at {path}")
    if path.is_file():
        return _read_files([path], path.parent.name if path.name == STATE and path.parent.name else path.stem)
    runs, failed = _read_folder(path)
    left_out = [f"left out: {error}" for error in failed]
    if not runs:
        for folder in sorted(child for child in path.iterdir() if child.is_dir() and any(candidates(child))):
            try:
                runs += _read_path(folder)
            except (FileFormatError, ConfigError) as error:
                failed.append(error)
                left_out.append(f"another run was left out: {error}")
    if not runs and failed:
        # A missing package keeps a log from being read; a file that is no log says less.
        first = next((error for error in failed if isinstance(error, ConfigError)), failed[0])
        more = f" (and {len(failed) - 1} more file{'s' if len(failed) > 2 else ''})" if len(failed) > 1 else ""
        raise type(first)(f"{first}{more}")
    if not runs:
        raise FileFormatError(
            f"no log in {path}: expected {STATE} or checkpoint-*/{STATE}, or a file {', '.join(_PATTERNS)}; it holds "
            f"{contents(path)}. A Trainer writes its log with the first checkpoint, or by trainer.save_state()"
        )
    runs[0].notes += left_out
    return runs


def _read_folder(folder: Path) -> tuple[list[Curves], list[FileFormatError | ConfigError]]:
    """The runs in the files of a folder, and what is wrong with the files that were tried and left out.

    Data, predictions and results have the same endings as logs. So groups of files are tried until one holds a training
    loss; where none does, the first group with other curves counts.
    """
    failed: list[FileFormatError | ConfigError] = []
    best: list[Curves] = []
    best_files: list[Path] = []
    for group in candidates(folder):
        runs: list[Curves] = []
        files: list[Path] = []
        for name, paths in group.items():
            try:
                runs += _read_files(paths, name)
                files.append(paths[0])
            except (FileFormatError, ConfigError) as error:
                failed.append(error)
        if len(runs) == 1 and runs[0].name in group:  # the name of a file; that of the folder says more
            runs[0].name = visible(folder.resolve().name)
        has_loss = any("loss" in run for run in runs)
        better = has_loss or not best
        failed += [FileFormatError(f"{file}: no curve of training loss") for file in (best_files if better else files)]
        if better:
            best, best_files = runs, files
        if has_loss:
            break
    return best, failed


def candidates(folder: Path) -> Iterator[dict[str, list[Path]]]:
    """Yield groups of files that may hold a log, the likeliest first: in a group, the files of each run by its name."""
    if state := _state_of(folder):
        yield {state.stem: [state]}
    for pattern in _PATTERNS:
        for place in (pattern, f"runs/*/{pattern}", f"logs/{pattern}"):
            runs: dict[str, list[Path]] = {}
            for file in sorted(file for file in folder.glob(place) if file.is_file()):
                tagged = TAGGED.fullmatch(file.name)
                # Event files of one folder are of one run: it was resumed, or it has a writer for the evaluation.
                name = pattern if "tfevents" in pattern else tagged["run"] if tagged else file.stem
                runs.setdefault(name, []).append(file)
            if runs:
                yield runs


def _state_of(folder: Path) -> Path | None:
    """The state file of a run: its own, or that of the newest checkpoint where the run went on since."""
    numbered = [
        (int(number), state)
        for state in folder.glob(f"checkpoint-*/{STATE}")
        if (number := state.parent.name.removeprefix("checkpoint-")).isdigit()
    ]
    newest = max(numbered, default=(0, None), key=lambda pair: pair[0])[1]
    own = folder / STATE
    if newest is None or not own.is_file():
        return own if own.is_file() else newest
    # A copy loses the times of files, so the step that stands in the file comes first.
    own_step, newest_step = _global_step(own), _global_step(newest)
    if own_step is not None and newest_step is not None:
        return newest if newest_step > own_step else own
    return newest if newest.stat().st_mtime > own.stat().st_mtime else own


def _global_step(state: Path) -> int | None:
    """The step of a state, from its head: its keys are sorted, and global_step comes before the log."""
    with state.open("rb") as file:
        found = _GLOBAL_STEP.search(file.read(1 << 16).partition(b'"log_history"')[0])
    return int(found[1]) if found else None


def contents(folder: Path) -> str:
    """The first names in a folder, for an error message."""
    names = sorted(child.name for child in folder.iterdir())
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") if names else "nothing"


def _read_files(paths: Sequence[Path], name: str) -> list[Curves]:
    """The runs in the files of one log, which are read one after the other."""
    notes: list[str] = []
    lines = chain.from_iterable(read_lines(path, notes) for path in paths)
    return _runs_of(lines, name, paths[0], notes)


def _runs_of(
    lines: Iterable[Mapping[str, Any]], name: str, path: Path | None = None, notes: Sequence[str] = ()
) -> list[Curves]:
    tables = tables_by_run(lines)
    is_database = path is not None and path.suffix in (".db", ".sqlite")  # whose file is named for a project
    named = is_database or len(tables) > 1
    return [_curves(run if named and run else name, table, path, notes) for run, table in tables.items()]


def _curves(name: str, table: LogTable, path: Path | None, file_notes: Sequence[str]) -> Curves:
    series, table_notes, seams = table.curves()
    # Keys are data, and notes are printed.
    notes = [visible(note) for note in (*dict.fromkeys(file_notes), *table_notes)]
    if not series:
        raise FileFormatError(
            f'{visible(str(path or name))}: no curve could be read; expected lines such as {{"step": 1, "loss": 2.3}}. '
            + ("; ".join(notes) or "It has no lines")
        )
    if "loss" not in series:
        found = [visible(key) for key in series]
        rest = f" and {len(found) - _NAMES_SHOWN} more" if len(found) > _NAMES_SHOWN else ""
        notes.append(f"no curve of training loss; found: {', '.join(found[:_NAMES_SHOWN])}{rest}")
    return Curves(visible(name), series, notes + _unit_notes(series), seams)


def _unit_notes(series: Mapping[str, Series]) -> list[str]:
    """Say where the perplexity is not exp(loss): the loss is in bits, or summed over micro-batches."""
    notes = []
    for loss_key, key in (("loss", "perplexity"), ("eval_loss", "eval_perplexity")):
        if loss_key not in series or key not in series:
            continue
        _, rows, other_rows = np.intersect1d(series[loss_key].steps, series[key].steps, return_indices=True)
        loss, perplexity = series[loss_key].values[rows], series[key].values[other_rows]
        usable = (perplexity > 1.001) & np.isfinite(loss) & np.isfinite(perplexity) & (loss > 0)
        if usable.sum() < 3:
            continue
        ratio = float(np.median(loss[usable] / np.log(perplexity[usable])))
        if abs(ratio * np.log(2) - 1) < _UNIT_TOLERANCE:
            notes.append(f"{loss_key} is in bits: {key} is 2 to its power")
        elif abs(ratio - round(ratio)) < _UNIT_TOLERANCE * ratio and round(ratio) > 1:
            times = f"{loss_key} is {round(ratio)} times the logarithm of {key}"
            notes.append(f"{times}: summed over micro-batches, not averaged")
    return notes


def _named_apart(runs: Sequence[Curves]) -> list[Curves]:
    """The runs, with a number behind a name that an earlier one has."""
    seen = Counter[str]()
    apart = []
    for run in runs:
        seen[run.name] += 1
        apart.append(replace(run, name=f"{run.name} ({seen[run.name]})") if seen[run.name] > 1 else run)
    return apart
