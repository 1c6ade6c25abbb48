"""`hf-objectives diagnose`, `plot`, `report`, `replay` and `rows`: what a run did."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hf_objectives import diagnostics
from hf_objectives.cli.options import SEVERITY_STYLES, DiagnoseOptions, PlotOptions, ReplayOptions, ReportOptions
from hf_objectives.diagnostics import Curves, excerpt, nothing_found, plot_training_metrics, read_runs, write_report
from hf_objectives.errors import FileFormatError
from hf_objectives.inspection import SEVERITIES, Finding, visible

_CHARACTERS = 300  # of an example's text
_SAME = 1e-4  # nats per token


def diagnose(options: DiagnoseOptions) -> int:
    """Print the findings of logs; 1 where one is at least as bad as `--fail_on`, else 0."""
    runs = read_runs(options.log)
    found = _judge(runs)
    if options.json:
        content = [
            {"run": run.name, "notes": run.notes, "findings": [f.to_dict() for f in found.get(run.name, [])]}
            for run in runs
        ]
        print(json.dumps(content, indent=1, ensure_ascii=False))
    else:
        console = Console(highlight=False)
        for run in runs:
            _print(console, run, found.get(run.name))
    worst = max((SEVERITIES.index(f.severity) for findings in found.values() for f in findings), default=-1)
    return int(options.fail_on is not None and worst >= SEVERITIES.index(options.fail_on))


def _judge(runs: Sequence[Curves]) -> dict[str, list[Finding]]:
    """Findings by run. A run that cannot be judged has none and gets a note, as long as another one can be."""
    found = {}
    last: FileFormatError | None = None
    for run in runs:
        try:
            found[run.name] = diagnostics.diagnose(run)
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
    for finding in findings:
        text = visible(f"  {finding.kind}, {finding.steps}: {finding.evidence}")
        console.print(Text.assemble((finding.severity, SEVERITY_STYLES[finding.severity]), text))
        console.print(Text(visible(f"         {finding.advice}"), style="dim"))


def plot(options: PlotOptions) -> None:
    """Draw logs over each other and print the path of the picture."""
    print(plot_training_metrics(options.run, options.output, findings=[] if options.no_findings else None))


def report(options: ReportOptions) -> None:
    """Write the report of a run and print where it is."""
    print(write_report(options.run, options.output, compare=options.compare))


def replay(options: ReplayOptions) -> None:
    """Print the losses of a batch as they were written and as they are now."""
    done = diagnostics.replay(options.folder, options.model)
    event, console = done.event, Console(highlight=False)
    if options.json:
        print(json.dumps({**asdict(done), "largest_difference": done.largest_difference}, indent=1, ensure_ascii=False))
        return
    weights = "the weights of that step" if done.exact else "other weights than those of that step"
    usual = "" if math.isnan(event["level"]) else f", usually {event['level']:.5g}"
    console.print(
        Text(
            f"step {event['step']}, {event['kind']}: loss {event['loss']:.5g}{usual}, gradient norm {event['grad_norm']}; "
            f"computed again with {done.model} ({weights}): {done.loss:.5g} a token with the step's own random numbers"
        )
    )
    columns = "source", "row", "tokens", "loss then", "loss now", "", "text, trained parts in ⟦⟧"
    table = Table(*columns, header_style="bold")
    for example in sorted(done.examples, key=lambda e: -math.inf if e["loss"] is None else -e["loss"]):
        remark = "suspect" if example["suspect"] else "" if example["tokens"] else "none trained"
        losses = ["" if example[key] is None else f"{example[key]:.4f}" for key in ("loss", "replayed")]
        place = Text(str(example["source"])), str(example["row"]), str(example["tokens"])
        text = Text(excerpt(example["text"], _CHARACTERS))
        table.add_row(*place, *losses, Text(remark, style="bold red"), text)
    console.print(table)
    gap = done.largest_difference
    console.print(f"largest difference {gap:.2g} nats per token" + (": reproduced" if gap < _SAME else ""))
