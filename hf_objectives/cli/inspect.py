"""`hf-objectives inspect`: what is trained in a data set, before anything is trained on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import AutoTokenizer, GenerationConfig

from hf_objectives import demo
from hf_objectives.errors import ConfigError, nearest
from hf_objectives.inspection import QUANTILES, InspectedRow, Inspection, inspect_rows, visible, write_page
from hf_objectives.preparation import load_rows
from hf_objectives.recipes import highlight, named_sources, parse_config, read_template

_BUILT_IN = "builtin"
_SOURCE_KEYS = ("path", "split", "weight", "max_epochs")  # a mixture's; the last two change no row
_CHARACTERS = 700
_BAR = 40
_STYLES = {"info": "cyan", "warning": "yellow", "error": "bold red"}


@dataclass
class InspectArguments:
    """What `hf-objectives inspect` takes: rows, a tokenizer, and the policies under which they will be trained."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "A .json/.jsonl/.parquet/.txt file, a glob, a Hub id, or 'builtin'."}
    )
    sources: str | None = field(default=None, metadata={"help": "A mapping of names to paths (JSON)."})
    dataset_split: str = field(default="train", metadata={"help": "Split of a Hub dataset."})
    tokenizer: str | None = field(default=None, metadata={"help": "Hub id or folder, or 'builtin'."})
    chat_template: str | None = field(default=None, metadata={"help": "A template, or the path of a .jinja file."})
    train_on: str = field(default="assistant", metadata={"help": "assistant, last_assistant or all."})
    max_length: int = field(default=1024, metadata={"help": "Tokens of a row."})
    overlength: str = field(default="drop", metadata={"help": "drop, split_turns or cut."})
    control_tokens: str = field(default="plain", metadata={"help": "plain or allow."})
    expand_turns: bool = field(default=False, metadata={"help": "One row per user turn."})
    packing: bool = field(default=False, metadata={"help": "Pack several documents into a row."})
    strategy: str = field(default="best_fit", metadata={"help": "best_fit, first_fit or concat."})
    examples: int = field(default=5, metadata={"help": "Rows to show in the terminal."})
    rows: int = field(default=1000, metadata={"help": "Rows to look at in each source, spread evenly over it."})
    html: str | None = field(default=None, metadata={"help": "A page to write, with every token."})

    def __post_init__(self) -> None:
        if not self.tokenizer:
            raise ConfigError("tokenizer is missing; give a Hub id, a folder, or 'builtin'")
        if self.rows < 1 or self.examples < 0:
            raise ConfigError(f"rows is {self.rows} and examples {self.examples}; expected at least 1 and 0")
        self.chat_template = read_template(self.chat_template)


def inspect(argv: Sequence[str]) -> int | None:
    """Show how rows are rendered and which tokens are trained, and warn of what is wrong.

    Returns:
        2 where rows are refused that training would refuse, as for any error; else None.

    Raises:
        HFObjectivesError: rows, tokenizer or settings that cannot be used.
    """
    (given,), _ = parse_config((InspectArguments,), argv)
    console = Console(highlight=False)
    tokenizer = _tokenizer(given.tokenizer)
    rows = _rows(named_sources(given.sources, given.dataset_name), given, console)
    inspection = inspect_rows(
        rows,
        tokenizer,
        max_length=given.max_length,
        packing=given.packing,
        strategy=given.strategy,
        overlength=given.overlength,
        train_on=given.train_on,
        control_tokens=given.control_tokens,
        expand_turns=given.expand_turns,
        chat_template=given.chat_template,
        stops=_stops(given.tokenizer),
        show=1000 if given.html else max(1, given.examples),
    )
    print_inspection(inspection, tokenizer, console, examples=given.examples)
    if given.html:
        console.print(Text(f"The page is {write_page(inspection, given.html, tokenizer)}"))
    return 2 if any(one.kind == "refused" for one in inspection.warnings) else None


def _tokenizer(name: str) -> Any:
    if name == _BUILT_IN:
        return demo.build_tokenizer()
    try:
        return AutoTokenizer.from_pretrained(name)
    except (ValueError, KeyError) as error:  # a folder of something else; a missing one is an OSError
        raise ConfigError(f"no tokenizer can be loaded from {name}: {error}") from error


def _stops(name: str) -> list[int]:
    """Where the model of a tokenizer stops, as its generation config says; none where it has none."""
    if name == _BUILT_IN:
        return []
    try:
        known = GenerationConfig.from_pretrained(name).eos_token_id
    except OSError:  # a tokenizer without a model
        return []
    return [] if known is None else [known] if isinstance(known, int) else list(known)


def _rows(sources: Mapping[str, Any], given: InspectArguments, console: Console) -> list[dict[str, Any]]:
    """Rows of every source, each with its source and number."""
    rows: list[dict[str, Any]] = []
    for name, about in sources.items():
        options = dict(about) if isinstance(about, Mapping) else {"path": about}
        for key in options:
            if key not in _SOURCE_KEYS:
                known = ", ".join(_SOURCE_KEYS)
                raise ConfigError(
                    f"source {name!r}: unknown key {key!r}; expected {known}{nearest(str(key), _SOURCE_KEYS)}"
                )
        where = options.get("path")
        if not isinstance(where, str):
            raise ConfigError(f"source {name!r} is {about!r}; expected a path, or a mapping with path")
        if where == _BUILT_IN:
            rows += [{**row, "source": name, "row": i} for i, row in enumerate(demo.chats(given.rows))]
            continue
        found = load_rows(where, split=str(options.get("split", given.dataset_split)))
        count = min(given.rows, len(found))
        rows += [{**found[i], "source": name, "row": i} for i in (k * len(found) // count for k in range(count))]
        if count < len(found):
            console.print(Text(f"{name}: {count:,} of {len(found):,} rows, evenly spread", style="dim"))
    return rows


def print_inspection(inspection: Inspection, tokenizer: Any, console: Console, *, examples: int = 5) -> None:
    """Print a few examples, the figures, the lengths, the ledger and the warnings.

    Args:
        inspection: what was found.
        tokenizer: what encoded the rows.
        console: where to.
        examples: rows to show.
    """
    console.rule("What is trained (marked)", align="left")
    for row in _few(inspection.examples, examples):
        size = len(row.input_ids) - row.more
        ids, labels = row.input_ids[:size].tolist(), row.labels[:size].tolist()
        text = highlight(tokenizer, ids, labels, brackets=not console.is_terminal)
        text.plain = visible(text.plain)  # of the same length, so that the marks stay where they are
        if len(text) > _CHARACTERS or row.more:
            left = f"{max(0, len(text) - _CHARACTERS):,} characters" + (f" and {row.more:,} tokens" if row.more else "")
            text = Text.assemble(text[:_CHARACTERS], (f" ... {left} more", "italic"))
        head = f"{visible(row.source)} {row.row}" + (f", {row.fate}" if row.fate else "")
        console.print(Text.assemble((f"[{head}] ", "bold"), text), "\n", sep="")
    console.print(_figures(inspection))
    _print_histogram(inspection, console)
    console.rule("Where every token goes", align="left")
    for line in inspection.ledger.lines():
        console.print(Text(visible(line)))
    console.rule("Warnings", align="left")
    if not inspection.warnings:
        console.print("None.")
    for one in inspection.warnings:
        evidence = visible(one.evidence)
        where = f" (rows: {visible(one.places)})" if one.rows else ""
        console.print(Text.assemble((one.severity, _STYLES[one.severity]), f"  {one.kind}: {evidence}{where}"))
        console.print(Text(f"         {one.advice}", style="dim"))


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
    figures = inspection.statistics
    table = Table(title="The rows in figures", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    quantiles = ", ".join(f"{share:.0%} {size:,}" for share, size in zip(QUANTILES, figures.quantiles, strict=True))
    limit = inspection.max_length
    table.add_row("rows looked at", f"{figures.rows:,}")
    table.add_row("rows kept, before packing", f"{figures.kept_rows:,}")
    table.add_row("tokens", f"{figures.tokens:,}")
    table.add_row("tokens kept", f"{figures.kept_tokens:,}")
    table.add_row("of these trained", f"{figures.trained_tokens:,} ({figures.trained_share:.1%})")
    table.add_row("tokens a row", f"{figures.shortest:,} to {figures.longest:,}, mean {figures.mean:,.0f}")
    table.add_row("quantiles", quantiles)
    if limit is not None:
        table.add_row(
            f"longer than {limit:,} (overlength {inspection.settings['overlength']})", f"{figures.too_long:,}"
        )
    if figures.packed_rows is not None:
        table.add_row("packed rows", f"{figures.packed_rows:,}, {figures.fill or 0:.1%} full")
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
