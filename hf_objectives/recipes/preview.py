"""A first look at what is trained: examples with the trained tokens marked, and where every token went."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hf_objectives.inspection import marked_runs
from hf_objectives.labels import Ledger
from hf_objectives.mixture import MixtureReport
from hf_objectives.types import ends_of_runs

_CHARACTERS = 700


def highlight(tokenizer: Any, input_ids: Sequence[int], labels: Sequence[int], *, brackets: bool = False) -> Text:
    """The text of a row with its trained tokens on green and the context dim.

    `brackets` puts trained runs between ⟦ and ⟧ as well, for logs without colour.
    """
    text = Text()
    for piece, trained in marked_runs(tokenizer, input_ids, labels):
        marked = f"⟦{piece}⟧" if brackets and trained else piece
        text.append(marked, style="bold black on green" if trained else "dim")
    return text


def print_preview(
    tokenizer: Any, rows: Sequence[Mapping[str, Any]], ledger: Ledger, console: Console, *, examples: int = 3
) -> None:
    """Print a few examples and the ledger.

    Args:
        rows: encoded rows (`input_ids`, `labels`, `source`), before packing.
        ledger: what became of every token.
        examples: how many rows to show, one of each source first.
    """
    shown: list[Mapping[str, Any]] = []
    for row in rows:
        if len(shown) < examples and row.get("source") not in {one.get("source") for one in shown}:
            shown.append(row)
    shown += [row for row in list(rows[:examples]) if row not in shown][: examples - len(shown)]
    console.rule("What is trained (marked)", align="left")
    for row in shown:
        text = highlight(tokenizer, row["input_ids"], row["labels"], brackets=not console.is_terminal)
        if len(text) > _CHARACTERS:
            text = Text.assemble(text[:_CHARACTERS], (f" ... {len(text) - _CHARACTERS} characters more", "italic"))
        console.print(Text(f"[{row.get('source', 'data')}] ", style="bold"), text, sep="")
        console.print()
    total = ledger.total()
    share = total.trained / max(1, total.trained + total.masked)
    console.print(f"{share:.1%} of the tokens are trained ({total.trained:,} of {total.trained + total.masked:,})")
    _print_stops(tokenizer, rows, console)
    for line in ledger.lines():
        console.print(line, highlight=False)


def _print_stops(tokenizer: Any, rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Print what share of the trained turns of encoded `rows` end with a control token, and with which."""
    control = set(tokenizer.added_tokens_decoder)
    ends: Counter[int] = Counter()
    for row in rows:
        labels = np.asarray(row["labels"])
        ends.update(labels[ends_of_runs(labels)].tolist())
    stops = {token: count for token, count in ends.most_common() if token in control}
    stopped, names = sum(stops.values()), ", ".join(map(str, tokenizer.convert_ids_to_tokens(list(stops))))
    line = f"{stopped} of {ends.total()} trained turns in a sample end with a control token {names}".rstrip()
    if 2 * stopped < ends.total():
        line += ": the model is hardly taught to stop; the chat template prints no stop there"
        console.print(Text(line, style="bold red"))
    else:
        console.print(line, highlight=False, markup=False)


def mixture_table(report: MixtureReport) -> Table:
    """What each source of a mixture was to give and gave."""
    table = Table(
        title=f"The mixture after {report.row:,} {report.counted}, shares of {report.unit}",
        title_justify="left",
        header_style="bold",
    )
    for column in ("", "asked", "share", "tokens", "examples", "epochs"):
        table.add_column(column, justify="right" if column else "left")
    for one in report:
        shares = f"{one.asked:.2%}", f"{one.share:.2%}"
        table.add_row(one.name, *shares, f"{one.tokens:,}", f"{one.examples:,}", f"{one.epochs:.2f}")
    return table
