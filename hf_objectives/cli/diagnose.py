"""`hf-objectives diagnose`: what is wrong with one or several runs, in the terminal or as JSON."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from hf_objectives.diagnostics import Curves, nothing_found, read_runs
from hf_objectives.diagnostics import diagnose as find
from hf_objectives.errors import FileFormatError
from hf_objectives.inspection import SEVERITIES, Finding, visible

_STYLES = {"info": "cyan", "warning": "yellow", "error": "bold red"}


def diagnose(argv: Sequence[str]) -> int:
    """Print the findings of the given logs.

    Returns:
        0, or 1 where `--fail_on` names a severity and a finding has it or a worse one.

    Raises:
        FileFormatError: there is no log, nothing in it can be read, or no run can be judged.
    """
    parser = argparse.ArgumentParser("hf-objectives diagnose", description="Say what is wrong with a run.")
    parser.add_argument(
        "log", nargs="+", help="output folder, trainer_state.json, JSON lines, CSV, TensorBoard or trackio"
    )
    parser.add_argument("--json", action="store_true", help="findings and notes as JSON")
    parser.add_argument("--fail_on", choices=SEVERITIES, help="exit code 1 on a finding that is at least so bad")
    given = parser.parse_args(list(argv))
    runs = read_runs(given.log)
    found = _found(runs)
    if given.json:
        content = [
            {"run": run.name, "notes": run.notes, "findings": [one.to_dict() for one in found.get(run.name, [])]}
            for run in runs
        ]
        print(json.dumps(content, indent=1, ensure_ascii=False))
    else:
        console = Console(highlight=False)
        for run in runs:
            _print(console, run, found.get(run.name))
    worst = max((SEVERITIES.index(one.severity) for findings in found.values() for one in findings), default=-1)
    return int(given.fail_on is not None and worst >= SEVERITIES.index(given.fail_on))


def _found(runs: Sequence[Curves]) -> dict[str, list[Finding]]:
    """Findings by run. A run that cannot be judged has none and gets a note, as long as another one can be."""
    found = {}
    last: FileFormatError | None = None
    for run in runs:
        try:
            found[run.name] = find(run)
        except FileFormatError as error:
            run.notes.append(f"not judged: {error}")
            last = error
    if last and not found:
        raise last
    return found


def _print(console: Console, run: Curves, findings: Sequence[Finding] | None) -> None:
    points = len(run.get("loss").steps)
    console.rule(Text(visible(f"{run.name}: {points:,} points of training loss")), align="left")
    for note in run.notes:
        console.print(Text(visible(f"note: {note}"), style="dim"))
    if findings is None:
        return
    if not findings:
        console.print(nothing_found(run))
    for one in findings:
        what = visible(f"  {one.kind}, {one.steps}: {one.evidence}")
        console.print(Text.assemble((one.severity, _STYLES[one.severity]), what))
        console.print(Text(visible(f"         {one.advice}"), style="dim"))
