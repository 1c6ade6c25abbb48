"""`hf-objectives inspect`: what is trained in a data set, before anything is trained on it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import GenerationConfig

from hf_objectives.cli.options import SEVERITY_STYLES, InspectOptions
from hf_objectives.errors import ConfigError
from hf_objectives.inspection import QUANTILES, InspectedRow, Inspection, inspect_rows, visible, write_page
from hf_objectives.labels import EncodingOptions
from hf_objectives.preparation import load_rows
from hf_objectives.recipes import (
    BUILT_IN,
    built_in_rows,
    is_built_in,
    load_tokenizer,
    named_sources,
    print_example,
    read_template,
)
from hf_objectives.trainers import stop_ids

_BAR = 40


def inspect(options: InspectOptions) -> int | None:
    """Show how rows are rendered and which tokens are trained, and warn; 2 where training would refuse a row."""
    # Beside JSON, what is for people goes to stderr.
    console, name = Console(highlight=False, stderr=options.json), str(options.tokenizer)
    tokenizer = _tokenizer(name)
    encoding = {field: getattr(options, field) for field in EncodingOptions.__annotations__}
    inspection = inspect_rows(
        _rows(named_sources(options.sources, options.dataset_name), options, console),
        tokenizer,
        **{**encoding, "chat_template": read_template(options.chat_template)},
        max_length=options.max_length,
        packing=options.packing,
        strategy=options.strategy,
        stops=_stops(name),
        show=1000 if options.html else max(1, options.examples),
    )
    if options.json:
        figures = {"statistics": asdict(inspection.statistics), "settings": inspection.settings}
        found = {
            "ledger": inspection.ledger.to_dict(),
            "warnings": [asdict(warning) for warning in inspection.warnings],
        }
        print(json.dumps({**figures, **found}, indent=1, ensure_ascii=False))
    else:
        print_inspection(inspection, tokenizer, console, examples=options.examples)
    if options.html:
        console.print(Text(f"The page is {write_page(inspection, options.html, tokenizer)}"))
    return 2 if any(warning.kind == "refused" for warning in inspection.warnings) else None


def _tokenizer(name: str) -> Any:
    try:
        return load_tokenizer(name)
    except (ValueError, KeyError) as error:  # a folder of something else; a missing one is an OSError
        raise ConfigError(f"no tokenizer can be loaded from {name}: {error}") from error


def _stops(name: str) -> list[int]:
    """Where the model of a tokenizer stops, as its generation config says; none where it has none."""
    if name == BUILT_IN:
        return []
    try:
        return stop_ids(GenerationConfig.from_pretrained(name))
    except OSError:  # a tokenizer without a model
        return []


def _rows(sources: Mapping[str, Any], options: InspectOptions, console: Console) -> list[dict[str, Any]]:
    """Rows of every source, spread evenly over it, each with its source and number."""
    rows: list[dict[str, Any]] = []
    for name, source in sources.items():
        place = options.place(name, source)
        found: Any = built_in_rows(place.path, options.rows) if is_built_in(place.path) else load_rows(place)
        count = min(options.rows, len(found))
        rows += [{**found[i], "source": name, "row": i} for i in (k * len(found) // count for k in range(count))]
        if count < len(found):
            console.print(Text(f"{name}: {count:,} of {len(found):,} rows, evenly spread", style="dim"))
    return rows


def print_inspection(inspection: Inspection, tokenizer: Any, console: Console, *, examples: int = 5) -> None:
    """Print `examples` rows, the figures, the lengths, the ledger and the warnings."""
    console.rule("What is trained (marked)", align="left")
    for row in _few(inspection.examples, examples):
        size = len(row.input_ids) - row.more
        ids, labels = row.input_ids[:size].tolist(), row.labels[:size].tolist()
        name = f"{row.source} {row.row}" + (f", {row.fate}" if row.fate else "")
        print_example(name, tokenizer, ids, labels, console, more=row.more)
    console.print(_figures(inspection))
    _print_histogram(inspection, console)
    console.rule("Where every token goes", align="left")
    for line in inspection.ledger.lines():
        console.print(Text(visible(line)))
    console.rule("Warnings", align="left")
    if not inspection.warnings:
        console.print("None.")
    for warning in inspection.warnings:
        line = f"  {warning.kind}: {visible(warning.evidence)}"
        line += f" (rows: {visible(warning.places)})" if warning.rows else ""
        console.print(Text.assemble((warning.severity, SEVERITY_STYLES[warning.severity]), line))
        console.print(Text(f"         {warning.advice}", style="dim"))


def _few(rows: Sequence[InspectedRow], count: int) -> list[InspectedRow]:
    """One row of each source, one of each warning, then the first."""
    first: dict[Any, InspectedRow] = {}
    for row in rows:
        first.setdefault(row.source, row)
    for row in rows:
        for kind in row.warnings:
            first.setdefault(("warning", kind), row)
    order = {id(row): row for row in [*first.values(), *rows]}
    return list(order.values())[:count]


def _figures(inspection: Inspection) -> Table:
    figures, limit = inspection.statistics, inspection.max_length
    quantiles = ", ".join(f"{share:.0%} {size:,}" for share, size in zip(QUANTILES, figures.quantiles, strict=True))
    rows = {
        "rows looked at": f"{figures.rows:,}",
        "rows kept, before packing": f"{figures.kept_rows:,}",
        "tokens": f"{figures.tokens:,}",
        "tokens kept": f"{figures.kept_tokens:,}",
        "of these trained": f"{figures.trained_tokens:,} ({figures.trained_share:.1%})",
        "tokens a row": f"{figures.shortest:,} to {figures.longest:,}, mean {figures.mean:,.0f}",
        "quantiles": quantiles,
    }
    if limit is not None:
        rows[f"longer than {limit:,} (overlength {inspection.settings['overlength']})"] = f"{figures.too_long:,}"
    if figures.packed_rows is not None:
        rows["packed rows"] = f"{figures.packed_rows:,}, {figures.fill or 0:.1%} full"
    table = Table(title="The rows in figures", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for row in rows.items():
        table.add_row(*row)
    return table


def _print_histogram(inspection: Inspection, console: Console) -> None:
    """Bars of lengths; those over max_length in red."""
    console.rule("Tokens a row", align="left")
    most = max(count for _, _, count in inspection.histogram)
    width = len(f"{inspection.histogram[-1][1]:,}")
    for low, high, count in inspection.histogram:
        over = inspection.max_length is not None and low > inspection.max_length
        eighths = round(8 * _BAR * count / most)
        bar = "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()
        bar = bar or ("▏" if count else "")
        line = Text(f"{low:>{width},} to {high:>{width},} ")
        console.print(line.append(bar, style="red" if over else "green").append(f" {count:,}"))
