"""`hf-objectives replay`: compute a batch again that the live monitor wrote."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hf_objectives.diagnostics import excerpt
from hf_objectives.diagnostics import replay as compute

_CHARACTERS = 300  # of an example's text
_SAME = 1e-4  # nats per token


def replay(argv: Sequence[str]) -> None:
    """Print the losses of a batch as they were written and as they are now.

    Raises:
        FileFormatError: the folder holds no event.
        ConfigError: no weights are known, or the monitor could tell no documents.
    """
    parser = argparse.ArgumentParser("hf-objectives replay", description="Compute a batch of a spike again.")
    parser.add_argument("folder", help="diagnostics/step_<n>_rank_<r> of a run")
    parser.add_argument(
        "--model", help="folder or Hub id; by default the weights of the step, or the checkpoint before"
    )
    given = parser.parse_args(list(argv))
    done = compute(given.folder, given.model)
    event, console = done.event, Console(highlight=False)
    weights = "the weights of that step" if done.exact else "other weights than those of that step"
    usual = "" if math.isnan(event["level"]) else f", usually {event['level']:.5g}"
    console.print(
        Text(
            f"step {event['step']}, {event['kind']}: loss {event['loss']:.5g}{usual}, gradient norm {event['grad_norm']}; "
            f"computed again with {done.model} ({weights}): {done.loss:.5g} a token with the step's own random numbers"
        )
    )
    table = Table(
        "source", "row", "tokens", "loss then", "loss now", "", "text, trained parts in ⟦⟧", header_style="bold"
    )
    for one in sorted(done.examples, key=lambda one: -math.inf if one["loss"] is None else -one["loss"]):
        mark = Text("suspect" if one["suspect"] else "" if one["tokens"] else "none trained", style="bold red")
        losses = ["" if one[key] is None else f"{one[key]:.4f}" for key in ("loss", "replayed")]
        figures = str(one["tokens"]), *losses
        table.add_row(
            Text(str(one["source"])), str(one["row"]), *figures, mark, Text(excerpt(one["text"], _CHARACTERS))
        )
    console.print(table)
    off = done.largest_difference
    console.print(f"largest difference {off:.2g} nats per token" + (": reproduced" if off < _SAME else ""))
