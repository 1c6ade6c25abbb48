"""Reading the log of a run, whoever wrote it, into one array per curve."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hf_objectives.diagnostics.log_files import PATTERNS, STATE, TAGGED, read_file
from hf_objectives.diagnostics.log_table import LogTable, Series, tables_by_run
from hf_objectives.errors import ConfigError, FileFormatError
from hf_objectives.inspection import visible

Log = Sequence[Mapping[str, Any]]
_EMPTY = Series(np.zeros(0, np.int64), np.zeros(0))
_SHOWN = 8  # names of curves
_STEPS = re.compile(rb'"global_step"\s*:\s*(\d+)')
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
    tables = tables_by_run(log)  # type: ignore[arg-type]
    return _named_apart([_curves(name or "the log", [(table, [])]) for name, table in tables.items()])


def _read_path(path: Path) -> list[Curves]:
    if not path.exists():
        raise FileFormatError(f"no log at {path}")
    if path.is_file():
        return _read_file(path, path.parent.name if path.name == STATE and path.parent.name else path.stem)
    runs, failed = _read_files(path)
    left = [f"left out: {error}" for error in failed]
    below = [] if runs else [folder for folder in sorted(path.iterdir()) if folder.is_dir() and any(_logs_in(folder))]
    for folder in below:
        try:
            runs += _read_path(folder)
        except FileFormatError as error:
            failed.append(error)
            left.append(f"another run was left out: {error}")
    if not runs and failed:
        # A missing package keeps a log from being read; a file that is none says less.
        first = next((error for error in failed if isinstance(error, ConfigError)), failed[0])
        more = f" (and {len(failed) - 1} more file{'s' if len(failed) > 2 else ''})" if len(failed) > 1 else ""
        raise type(first)(f"{first}{more}")
    if not runs:
        raise FileFormatError(
            f"no log in {path}: expected {STATE} or checkpoint-*/{STATE}, or a file {', '.join(PATTERNS)}; "
            f"it holds {_inside(path)}. A Trainer writes its log with the first checkpoint, or by trainer.save_state()"
        )
    runs[0].notes += left
    return runs


def _read_files(folder: Path) -> tuple[list[Curves], list[FileFormatError | ConfigError]]:
    """The runs in the files of a folder, and what is wrong with those that were tried and left.

    Data, predictions and results have the same endings as logs: files are tried until some hold a training loss; those
    that hold other curves count where there is no such file.
    """
    failed: list[FileFormatError | ConfigError] = []
    best: list[Curves] = []
    of_best: list[str] = []
    for runs_of in _logs_in(folder):
        runs: list[Curves] = []
        read: list[str] = []
        for name, files in runs_of.items():
            try:
                runs += _read_file(files[0], name) if len(files) == 1 else [_merged(files, name)]
                read.append(str(files[0]))
            except (FileFormatError, ConfigError) as error:
                failed.append(error)
        if len(runs) == 1 and runs[0].name in runs_of:  # a file's name; the folder's says more
            runs[0].name = visible(folder.resolve().name)
        found = any("loss" in run for run in runs)
        left = of_best if found or not best else read
        failed += [FileFormatError(f"{file}: no curve of training loss") for file in left]
        if found or not best:
            best, of_best = runs, read
        if found:
            break
    return best, failed


def _logs_in(folder: Path) -> Iterator[dict[str, list[Path]]]:
    """Files that may hold a log, the likeliest first: of each kind the files of every run, by a name."""
    if state := _state_of(folder):
        yield {state.stem: [state]}
    for pattern in PATTERNS:
        for where in (pattern, f"runs/*/{pattern}", f"logs/{pattern}"):
            runs: dict[str, list[Path]] = {}
            for file in sorted(file for file in folder.glob(where) if file.is_file()):
                tagged = TAGGED.fullmatch(file.name)
                # Event files of one folder are of one run: resumed, or with a writer for the evaluation.
                name = pattern if "tfevents" in pattern else tagged["run"] if tagged else file.stem
                runs.setdefault(name, []).append(file)
            if runs:
                yield runs


def _merged(files: Sequence[Path], name: str) -> Curves:
    return _curves(name, [content for file in files for content in read_file(file).values()], str(files[0]))


def _read_file(path: Path, name: str) -> list[Curves]:
    return [_curves(run or name, [content], str(path)) for run, content in read_file(path).items()]


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
    if newest is None:
        return own
    # A copy loses the times of files; the step stands in the file.
    step, later = _step_in(own), _step_in(newest)
    if step is not None and later is not None:
        return newest if later > step else own
    return newest if newest.stat().st_mtime > own.stat().st_mtime else own


def _step_in(state: Path) -> int | None:
    """The step of a state, from its head: its keys are sorted, and global_step comes before the log."""
    with state.open("rb") as file:
        found = _STEPS.search(file.read(1 << 16).partition(b'"log_history"')[0])
    return int(found[1]) if found else None


def _inside(folder: Path) -> str:
    names = sorted(child.name for child in folder.iterdir())
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") if names else "nothing"


def _curves(name: str, contents: Sequence[tuple[LogTable, list[str]]], where: str = "") -> Curves:
    table = contents[0][0]
    for more, _ in contents[1:]:
        table.append(more)
    series, said, seams = table.curves()
    # Keys are data, and notes are printed.
    notes = [visible(note) for note in (*dict.fromkeys(note for _, found in contents for note in found), *said)]
    if not series:
        raise FileFormatError(
            f'{visible(where or name)}: no curve could be read; expected lines such as {{"step": 1, "loss": 2.3}}. '
            + ("; ".join(notes) or "It has no lines")
        )
    if "loss" not in series:
        found = [visible(key) for key in series]
        rest = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        notes.append(f"no curve of training loss; found: {', '.join(found[:_SHOWN])}{rest}")
    return Curves(visible(name), series, notes + _units(series), seams)


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
