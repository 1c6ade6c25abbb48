"""An inspection as one HTML page that needs nothing else: no network, no library, text from data never read as markup."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jinja2
import orjson

from hf_objectives.diagnostics.inspection import QUANTILES, Inspection, Token

_TEMPLATES = Path(__file__).parent / "templates"


def write_page(inspection: Inspection, path: str | Path, tokenizer: Any = None) -> Path:
    """Write the page.

    Args:
        inspection: what was found.
        path: the page, .html.
        tokenizer: gives the names of tokens in its vocabulary; without it only their texts and ids are shown.

    Returns:
        The path.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template("inspection.html.jinja").render(
        one=inspection,
        figures=inspection.statistics,
        quantiles=list(zip(QUANTILES, inspection.statistics.quantiles, strict=True)),
        most=max(count for _, _, count in inspection.histogram),
        data=_script_json(page_data(inspection, tokenizer)),
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def _script_json(data: Any) -> str:
    """JSON that cannot end the script element that it stands in."""
    return orjson.dumps(data).decode().replace("<", "\\u003c")


def page_data(inspection: Inspection, tokenizer: Any = None) -> dict[str, Any]:
    """What the page draws, as JSON values: each piece of text once, rows as numbers of pieces.

    Returns:
        `pieces`: text, ids and names of each piece. `examples`: source, row, fate, kinds of warnings, pieces `p` and `m`,
        the lengths of runs of pieces in turn untrained and trained. `packed`: rows, each a list of such documents.
    """
    numbers: dict[tuple[str, tuple[int, ...]], int] = {}
    pieces: list[list[Any]] = []

    def encoded(tokens: Iterable[Token]) -> dict[str, list[int]]:
        listed, trained = [], []
        for token in tokens:
            key = token.text, token.ids
            if key not in numbers:
                numbers[key] = len(pieces)
                names = tokenizer.convert_ids_to_tokens(list(token.ids)) if tokenizer is not None else []
                pieces.append([token.text, list(token.ids), " ".join(map(str, names))])
            listed.append(numbers[key])
            trained.append(token.trained)
        runs = [(flag, len(list(run))) for flag, run in itertools.groupby(trained)]
        lengths = [length for _, length in runs]
        return {"p": listed, "m": [0, *lengths] if runs and runs[0][0] else lengths}

    examples = [
        {"s": row.source, "r": row.row, "f": row.fate, "w": list(row.warnings), **encoded(row.tokens)}
        for row in inspection.examples
    ]
    packed = [
        [{"s": source, "r": number, **encoded(tokens)} for source, number, tokens in row.documents]
        for row in inspection.packed
    ]
    return {"pieces": pieces, "examples": examples, "packed": packed}
