"""Tables of figures in the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.table import Table

from hf_objectives.mixture import MixtureReport


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table whose first column is text and whose other columns are figures."""
    made = Table(title=title, title_justify="left", header_style="bold")
    for i, column in enumerate(columns):
        made.add_column(column, justify="right" if i else "left")
    for row in rows:
        made.add_row(*row)
    return made


def figure(value: float | None) -> str:
    """A figure in four digits, a count in full; "-" where there is none."""
    if value is None or math.isnan(value):
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if value < 1e6 else f"{value:.2e}"


def mixture_table(report: MixtureReport) -> Table:
    """What each source of a mixture was to give and gave."""
    return table(
        f"The mixture after {report.row:,} {report.counted}, shares of {report.unit}",
        ("", "asked", "share", "tokens", "examples", "epochs"),
        (
            (s.name, f"{s.asked:.2%}", f"{s.share:.2%}", f"{s.tokens:,}", f"{s.examples:,}", f"{s.epochs:.2f}")
            for s in report
        ),
    )


def figures_table(before: Mapping[str, Any], after: Mapping[str, Any], figures: Mapping[str, str]) -> Table:
    """Held-out metrics before and after training.

    First come perplexities that `figures` does not name, in all and per source, with their tokens, and with their change
    where the metrics have it. The metrics that `figures` names come after them; a rate that has an interval gets a row
    with it.
    """
    rows: list[tuple[str, ...]] = []
    for name in sorted(key.removesuffix("_perplexity") for key in after if key.endswith("_perplexity")):
        if f"{name}_perplexity" in figures:
            continue
        then, now = (figure(metrics.get(f"{name}_perplexity")) for metrics in (before, after))
        if (change := after.get(f"{name}_perplexity_increase")) is not None:
            now += f" ({change:+.1%})"
        source = name.removeprefix("eval").replace("_", ", ", 1)
        tokens = after.get(f"{name}_num_tokens")
        rows.append((f"perplexity{source}", "" if tokens is None else f"{int(tokens):,}", then, now))
    for key in (key for key in figures if key in after):
        rows.append((figures[key], "", figure(before.get(key)), figure(after[key])))
        if f"{key}_low" in after:
            ends = [f"{metrics[f'{key}_low']:.3f} to {metrics[f'{key}_high']:.3f}" for metrics in (before, after)]
            rows.append(("  95 % interval", "", *ends))
    pairs = after.get("eval_num_pairs")
    title = "Held out, before and after" if pairs is None else f"{int(pairs):,} held-out pairs, before and after"
    columns: tuple[str, ...] = ("", "tokens", "before", "after")
    if not any(row[1] for row in rows):
        columns, rows = ("", *columns[2:]), [(row[0], *row[2:]) for row in rows]
    return table(title, columns, rows)
