"""A first look at what is trained: examples with the trained tokens marked, and what happened to every token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from hf_objectives.inspection import marked_runs
from hf_objectives.labels import Ledger
from hf_objectives.types import ends_of_runs

_CHARACTERS = 700  # of an example


def highlight(tokenizer: Any, input_ids: Sequence[int], labels: Sequence[int], *, brackets: bool = False) -> Text:
    """The text of a row: trained tokens on green, the context dim.

    `brackets` also puts trained runs between ⟦ and ⟧, for logs without colour.
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
        tokenizer: what encoded the rows.
        rows: encoded rows (`input_ids`, `labels`, `source`), before packing.
        ledger: what happened to every token.
        console: where to print.
        examples: how many rows to show, one of each source first.
    """
    first = {row.get("source"): i for i, row in reversed(list(enumerate(rows)))}
    order = [*sorted(first.values()), *(i for i in range(len(rows)) if i not in first.values())]
    console.rule("What is trained (marked)", align="left")
    for row in (rows[i] for i in order[:examples]):
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
    """Print how many of the trained turns end with a control token, and with which."""
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
