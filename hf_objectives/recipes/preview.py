"""What a recipe prints: examples with the trained tokens marked, what happened to every token, tables of figures."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hf_objectives.errors import StopTokenError
from hf_objectives.inspection import marked_runs, visible
from hf_objectives.labels import Ledger
from hf_objectives.mixture import MixtureReport
from hf_objectives.types import ends_of_runs

_CHARACTERS = 700  # of an example


def highlight(tokenizer: Any, input_ids: Sequence[int], labels: Sequence[int], *, brackets: bool = False) -> Text:
    """The text of a row: trained tokens on green, the context dim; control characters as signs.

    `brackets` also puts trained runs between ⟦ and ⟧, for logs without colour.
    """
    text = Text()
    for piece, trained in marked_runs(tokenizer, input_ids, labels):
        marked = f"⟦{piece}⟧" if brackets and trained else piece
        text.append(visible(marked), style="bold black on green" if trained else "dim")
    return text


def print_example(
    name: str, tokenizer: Any, input_ids: Sequence[int], labels: Sequence[int], console: Console, *, more: int = 0
) -> None:
    """Print the name and the beginning of a row, of which `more` tokens are not given."""
    text = highlight(tokenizer, input_ids, labels, brackets=not console.is_terminal)
    if len(text) > _CHARACTERS or more:
        left = f"{max(0, len(text) - _CHARACTERS):,} characters" + (f" and {more:,} tokens" if more else "")
        text = Text.assemble(text[:_CHARACTERS], (f" ... {left} more", "italic"))
    console.print(Text.assemble((f"[{visible(name)}] ", "bold"), text), "\n", sep="")


def print_preview(
    tokenizer: Any, rows: Sequence[Mapping[str, Any]], ledger: Ledger, console: Console, *, examples: int = 3
) -> None:
    """Print a few of some encoded rows, one of each source first, and what happened to every token."""
    first = {row.get("source"): i for i, row in reversed(list(enumerate(rows)))}.values()
    console.rule("What is trained (marked)", align="left")
    for i in sorted(range(len(rows)), key=lambda i: i not in first)[:examples]:
        row = rows[i]
        print_example(str(row.get("source", "data")), tokenizer, row["input_ids"], row["labels"], console)
    total = ledger.total()
    share = total.trained / max(1, total.trained + total.masked)
    console.print(f"{share:.1%} of the tokens are trained ({total.trained:,} of {total.trained + total.masked:,})")
    _print_stops(tokenizer, rows, console)
    for line in ledger.lines():
        console.print(line, highlight=False)


def _stops(tokenizer: Any, rows: Sequence[Mapping[str, Any]]) -> tuple[str, bool]:
    """How many of the trained turns end with a control token, and with which; and whether it is less than half."""
    control = set(tokenizer.added_tokens_decoder)
    ends: Counter[int] = Counter()
    for row in rows:
        labels = np.asarray(row["labels"])
        ends.update(labels[ends_of_runs(labels)].tolist())
    stops = {token: count for token, count in ends.most_common() if token in control}
    stopped, names = sum(stops.values()), ", ".join(map(str, tokenizer.convert_ids_to_tokens(list(stops))))
    line = f"{stopped} of {ends.total()} trained turns in a sample end with a control token {names}".rstrip()
    return line, 2 * stopped < ends.total()


def check_stops(tokenizer: Any, rows: Sequence[Mapping[str, Any]], *, allow_no_stop: bool) -> None:
    """Check, on a sample of encoded rows, that the model is taught to stop.

    Raises:
        StopTokenError: less than half of the trained turns end with a control token.
    """
    line, few = _stops(tokenizer, rows)
    if few and not allow_no_stop:
        raise StopTokenError(
            f"{line}: a model that is trained on them does not stop; give a chat_template that closes the assistant's turns, "
            "or set allow_no_stop if something else stops it (GLM stops at the next role's marker)"
        )


def _print_stops(tokenizer: Any, rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    line, few = _stops(tokenizer, rows)
    if few:
        line += ": the model is hardly taught to stop; the chat template prints no stop there"
        console.print(Text(line, style="bold red"))
    else:
        console.print(line, highlight=False, markup=False)


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

    First come perplexities that `figures` does not name, in all and per source, then the metrics that it names. A rate that
    has an interval gets a row with it.
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
