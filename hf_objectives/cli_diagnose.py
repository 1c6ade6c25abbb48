"""`hf-objectives diagnose`: what is wrong with one or several runs, in the terminal or as JSON."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from hf_objectives.diagnostics.curves import read_runs
from hf_objectives.diagnostics.detect import diagnose as find
from hf_objectives.diagnostics.findings import SEVERITIES, Finding

_STYLES = {"info": "cyan", "warning": "yellow", "error": "bold red"}


def diagnose(argv: Sequence[str]) -> int:
    """Print the findings of the given logs.

    Returns:
        0, or 1 where `--fail_on` names a severity and a finding has it or a worse one.

    Raises:
        FileFormatError: there is no log, or nothing in it can be read.
    """
    parser = argparse.ArgumentParser("hf-objectives diagnose", description="Say what is wrong with a run.")
    parser.add_argument(
        "log", nargs="+", help="output folder, trainer_state.json, JSON lines, CSV, TensorBoard or trackio"
    )
    parser.add_argument("--json", action="store_true", help="findings and notes as JSON")
    parser.add_argument("--fail_on", choices=SEVERITIES, help="exit code 1 on a finding that is at least so bad")
    given = parser.parse_args(list(argv))
    runs = read_runs(given.log)
    found = {run.name: find(run) for run in runs}
    if given.json:
        content = [
            {"run": run.name, "notes": run.notes, "findings": [one.to_dict() for one in found[run.name]]}
            for run in runs
        ]
        print(json.dumps(content, indent=1, ensure_ascii=False))
    else:
        console = Console(highlight=False)
        for run in runs:
            _print(console, run.name, run.notes, found[run.name], points=len(run.get("loss").steps))
    worst = max((SEVERITIES.index(one.severity) for findings in found.values() for one in findings), default=-1)
    return int(given.fail_on is not None and worst >= SEVERITIES.index(given.fail_on))


def _print(console: Console, name: str, notes: Sequence[str], findings: Sequence[Finding], *, points: int) -> None:
    console.rule(Text(f"{name}: {points:,} points of training loss"), align="left")
    for note in notes:
        console.print(Text(f"note: {note}", style="dim"))
    if not findings:
        console.print("Nothing is wrong that a log can show.")
    for one in findings:
        style = _STYLES[one.severity]
        console.print(Text.assemble((one.severity, style), f"  {one.kind}, {one.steps}: {one.evidence}"))
        console.print(Text(f"         {one.advice}", style="dim"))
