"""`hf-objectives prepare`, `mixture` and `rows`: rows on disk, the shares of a mixture, the rows of a step."""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Iterable
from dataclasses import asdict, replace

from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import AutoTokenizer

from hf_objectives.cli.options import MixtureOptions, PrepareOptions, RowsOptions
from hf_objectives.diagnostics import plot_mixture, read_curves, report_of_log
from hf_objectives.inspection import visible
from hf_objectives.mixture import MixtureReport, build_mixture
from hf_objectives.preparation import prepare_corpus
from hf_objectives.recipes import mixture_table, read_template, rows_of_step

_POINTS = 60  # of a curve


def prepare(options: PrepareOptions) -> None:
    """Prepare packed rows in a folder and say what happened to every token."""
    settings = replace(options, chat_template=read_template(options.chat_template))
    tokenizer, folder = AutoTokenizer.from_pretrained(options.tokenizer), str(options.output_dir)
    manifest = prepare_corpus(options.named_sources(), tokenizer, folder, settings, overwrite=options.overwrite)
    if options.json:
        print(
            json.dumps({"folder": folder, "ledgers": {k: v.to_dict() for k, v in manifest.ledgers.items()}}, indent=1)
        )
        return
    print("\n".join(manifest.lines()))
    print(f"load_prepared({folder!r}) or load_dataset({options.file_format!r}, data_dir={folder!r})")


def mixture(options: MixtureOptions) -> None:
    """Say what a mixture will give, or has given, and draw it."""
    if options.run is not None:
        curves = read_curves(options.run)
        _show(report_of_log(curves), [], options)
        if options.plot:
            _say(str(plot_mixture(curves, options.plot)), options)
        return
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer) if options.tokenizer else None
    made = build_mixture(options.mixture, tokenizer=tokenizer, seed=options.seed)  # type: ignore[arg-type]
    rows = options.rows
    if options.tokens is not None:
        first, tokens = made.first_rows()
        rows = math.ceil(options.tokens * first / tokens) if tokens else rows
    reports = [made.report(rows * i // _POINTS) for i in range(1, _POINTS + 1)]
    _show(reports[-1], made.expect(reports[-1].row), options)
    if options.plot:
        _say(str(plot_mixture(reports, options.plot)), options)


def _show(report: MixtureReport, expected: Iterable[str], options: MixtureOptions) -> None:
    if options.json:
        print(json.dumps({**report.to_dict(), "notes": [*expected]}, indent=1, ensure_ascii=False))
        return
    console = Console()
    console.print(mixture_table(report))
    for line in expected:
        console.print(line, highlight=False, markup=False)


def _say(line: str, options: MixtureOptions) -> None:
    """A line for people: beside JSON it goes to stderr."""
    print(line, file=sys.stderr if options.json else sys.stdout)


def rows(options: RowsOptions) -> None:
    """Print source, number and length of each document of a step, and its text where asked."""
    assert options.step is not None
    logger, level = logging.getLogger("hf_objectives"), logging.getLogger("hf_objectives").level
    logger.setLevel(logging.WARNING)  # what preparation says was said when the run began
    try:
        found = rows_of_step(options.run, options.step, text=options.text)
    finally:
        logger.setLevel(level)
    if options.json:
        for document in found:
            values = {name: value for name, value in asdict(document).items() if options.text or name != "text"}
            print(json.dumps(values, ensure_ascii=False))
        return
    table = Table(
        "source", "row", "tokens", *(["text, trained parts in ⟦⟧"] if options.text else []), header_style="bold"
    )
    for document in found:
        cells = (document.source, document.row, document.tokens, *([document.text] if options.text else []))
        table.add_row(*(Text(visible(str(cell))) for cell in cells))
    console = Console(highlight=False)
    console.print(table)
    tokens = sum(document.tokens for document in found)
    console.print(f"step {options.step}: {len(found):,} documents, {tokens:,} tokens")
