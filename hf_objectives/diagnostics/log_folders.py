"""Find the log files of a run in a folder."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from hf_objectives.diagnostics.log_files import STATE, TAGGED

#: Names of files that may hold a log, the likeliest first.
PATTERNS = ("*.jsonl", "*.ndjson", "*.csv", "*.tsv", "events.out.tfevents.*", "*.db", "*.sqlite", "*log*.json")
_GLOBAL_STEP = re.compile(rb'"global_step"\s*:\s*(\d+)')


def candidates(folder: Path) -> Iterator[dict[str, list[Path]]]:
    """Yield groups of files that may hold a log, the likeliest first: in a group, the files of each run by its name."""
    if state := _state_of(folder):
        yield {state.stem: [state]}
    for pattern in PATTERNS:
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
