"""Reading the log of a run, whoever wrote it, into one array per curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hf_objectives.diagnostics.log_files import PATTERNS, STATE, read_file
from hf_objectives.diagnostics.log_table import LogTable, Series
from hf_objectives.errors import FileFormatError

Log = Sequence[Mapping[str, Any]]
_EMPTY = Series(np.zeros(0, np.int64), np.zeros(0))
_BITS = 0.005  # relative; two ways of writing one perplexity agree better than that


@dataclass
class Curves:
    """The log of one run.

    Attributes:
        name: of the run, from its folder or file.
        series: curves by the Trainer's names: loss, eval_loss, learning_rate, grad_norm, epoch, ...
        notes: what could not be read or was put right, a sentence each.
        seams: steps at which the run was resumed.
    """

    name: str
    series: dict[str, Series] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    seams: list[int] = field(default_factory=list)

    def __contains__(self, key: str) -> bool:
        return key in self.series

    def get(self, key: str) -> Series:
        """The curve of that name; an empty one where the log has none."""
        return self.series.get(key, _EMPTY)


def read_curves(log: str | Path | Log | Curves) -> Curves:
    """The log of one run.

    Args:
        log: a `trainer_state.json`, a checkpoint or output folder, a file of JSON lines (the Trainer's keys, or
            `train_loss` and `val_loss`), a CSV, TensorBoard events, trackio's database, or a Trainer's `log_history`.

    Raises:
        FileFormatError: there is no log, nothing in it can be read, or it holds several runs.
        ConfigError: a package is missing that reads it.
    """
    runs = read_runs(log)
    if len(runs) > 1:
        raise FileFormatError(
            f"{log} holds {len(runs)} runs ({', '.join(run.name for run in runs[:6])}); expected one here"
        )
    return runs[0]


def read_runs(log: str | Path | Log | Curves | Sequence[str | Path]) -> list[Curves]:
    """The logs of one or several runs: what `read_curves` takes, a folder of run folders, or a list of paths.

    Raises:
        FileFormatError: there is no log, or nothing in it can be read.
        ConfigError: a package is missing that reads it.
    """
    if isinstance(log, Curves):
        return [log]
    if isinstance(log, (str, Path)):
        return _named_apart(_read_path(Path(log)))
    if log and all(isinstance(one, (str, Path)) for one in log):
        return _named_apart([run for one in log for run in _read_path(Path(one))])  # type: ignore[arg-type]
    for i, line in enumerate(log):
        if not isinstance(line, Mapping):
            raise FileFormatError(
                f"entry {i} of the log is {line!r:.60}; expected a mapping such as a Trainer's log_history has"
            )
    table = LogTable()
    table.extend(log)  # type: ignore[arg-type]
    return [_curves("the log", [(table, [])])]


def _read_path(path: Path) -> list[Curves]:
    if not path.exists():
        raise FileFormatError(f"no log at {path}")
    if path.is_file():
        return _read_file(path, path.parent.name if path.name == STATE and path.parent.name else path.stem)
    if state := _state_of(path):
        return _read_file(state, path.resolve().name)
    if files := _files_of(path):
        if "tfevents" in files[0].name:  # event files of one folder are one run that was resumed
            return [_curves(path.resolve().name, [read_file(file)[""] for file in files])]
        return [
            run for file in files for run in _read_file(file, path.resolve().name if len(files) == 1 else file.stem)
        ]
    below = [
        folder for folder in sorted(path.iterdir()) if folder.is_dir() and (_state_of(folder) or _files_of(folder))
    ]
    if not below:
        raise FileFormatError(
            f"no log in {path}: expected {STATE} or checkpoint-*/{STATE}, or a file {', '.join(PATTERNS)}; "
            f"it holds {_inside(path)}. A Trainer writes its log with the first checkpoint, or by trainer.save_state()"
        )
    runs: list[Curves] = []
    failed: list[FileFormatError] = []
    for folder in below:
        try:
            runs += _read_path(folder)
        except FileFormatError as error:
            failed.append(error)
    if not runs:
        raise failed[0]
    runs[0].notes += [f"another run was left out: {error}" for error in failed]
    return runs


def _read_file(path: Path, name: str) -> list[Curves]:
    runs = read_file(path)
    return [_curves(run or name, [content]) for run, content in runs.items()]


def _state_of(folder: Path) -> Path | None:
    """The state file of a run: its own, or that of the newest checkpoint where the run has gone on since."""
    numbered = [
        (int(number), state)
        for state in folder.glob(f"checkpoint-*/{STATE}")
        if (number := state.parent.name.removeprefix("checkpoint-")).isdigit()
    ]
    newest = max(numbered, default=(0, None), key=lambda one: one[0])[1]
    own = folder / STATE
    if not own.is_file():
        return newest
    return newest if newest and newest.stat().st_mtime > own.stat().st_mtime else own


def _files_of(folder: Path) -> list[Path]:
    for pattern in PATTERNS:
        for where in (pattern, f"runs/*/{pattern}", f"logs/{pattern}"):
            if files := sorted(file for file in folder.glob(where) if file.is_file()):
                return files
    return []


def _inside(folder: Path) -> str:
    names = sorted(child.name for child in folder.iterdir())
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") if names else "nothing"


def _curves(name: str, contents: Sequence[tuple[LogTable, list[str]]]) -> Curves:
    table = contents[0][0]
    for more, _ in contents[1:]:
        table.append(more)
    series, said, seams = table.curves()
    notes = [note for _, found in contents for note in found] + said
    if not series:
        raise FileFormatError(
            f'{name}: no curve could be read; expected lines such as {{"step": 1, "loss": 2.3}}. '
            + ("; ".join(notes) or "It has no lines")
        )
    return Curves(name, series, notes + _units(series), seams)


def _units(series: Mapping[str, Series]) -> list[str]:
    """Says where a perplexity is not that of the loss beside it: loss in bits, or summed over micro-batches."""
    notes = []
    for loss_key, key in (("loss", "perplexity"), ("eval_loss", "eval_perplexity")):
        if loss_key not in series or key not in series:
            continue
        _, at, of = np.intersect1d(series[loss_key].steps, series[key].steps, return_indices=True)
        loss, perplexity = series[loss_key].values[at], series[key].values[of]
        usable = (perplexity > 1.001) & np.isfinite(loss) & np.isfinite(perplexity) & (loss > 0)
        if usable.sum() < 3:
            continue
        nats = float(np.median(loss[usable] / np.log(perplexity[usable])))
        if abs(nats * np.log(2) - 1) < _BITS:
            notes.append(f"{loss_key} is in bits: {key} is 2 to its power")
        elif abs(nats - round(nats)) < _BITS * nats and round(nats) > 1:
            notes.append(
                f"{loss_key} is {round(nats)} times the logarithm of {key}: summed over micro-batches, not averaged"
            )
    return notes


def _named_apart(runs: list[Curves]) -> list[Curves]:
    seen: dict[str, int] = {}
    for run in runs:
        seen[run.name] = seen.get(run.name, 0) + 1
        if seen[run.name] > 1:
            run.name = f"{run.name} ({seen[run.name]})"
    return runs
