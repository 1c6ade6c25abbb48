"""Write an inspection as one HTML page. It needs no network and no library, and text from data is never read as markup."""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from hf_objectives.inspection.rows import QUANTILES, Inspection
from hf_objectives.inspection.safe_text import script_hash, script_json, visible
from hf_objectives.inspection.token_texts import Token

_TEMPLATES = files(__package__) / "templates"


def write_page(inspection: Inspection, path: str | Path, tokenizer: Any = None) -> Path:
    """Write an inspection as one HTML page, and return its path.

    Args:
        inspection: what was found.
        path: the page, .html.
        tokenizer: gives the names of tokens in its vocabulary. Without it only their texts and ids are shown.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(str(__package__)),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: visible(value) if type(value) is str else value,  # Markup is the page's own
    )
    script = (_TEMPLATES / "inspection.js").read_text(encoding="utf-8")
    page = environment.get_template("inspection.html.jinja").render(
        one=inspection,
        figures=inspection.statistics,
        quantiles=list(zip(QUANTILES, inspection.statistics.quantiles, strict=True)),
        most=max(count for _, _, count in inspection.histogram),
        data=Markup(script_json(page_data(inspection, tokenizer))),
        script=Markup(script),
        hash=Markup(script_hash(script)),  # which the page's policy names
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(page.encode("utf-8", "replace"))  # half a surrogate pair is no UTF-8
    return path


def page_data(inspection: Inspection, tokenizer: Any = None) -> dict[str, Any]:
    """What the page draws, as JSON values. Each piece of text stands there once; rows are numbers of pieces.

    Returns:
        `pieces`: text, ids and names of each. `examples`: source `s`, row `r`, fate `f`, kinds of warnings `w`, number `x` of
        tokens that are not on the page, pieces `p`, and `m`, the lengths of runs of pieces, in turn untrained and trained.
        `packed`: rows, each a list of such documents.
    """
    numbers: dict[tuple[str, tuple[int, ...]], int] = {}
    pieces: list[list[Any]] = []

    def encoded(tokens: Iterable[Token]) -> dict[str, list[int]]:
        listed, trained = [], []
        for token in tokens:
            key = token.text, token.ids
            if key not in numbers:
                numbers[key] = len(pieces)
                pieces.append([visible(token.text), list(token.ids), _names(tokenizer, token)])
            listed.append(numbers[key])
            trained.append(token.trained)
        runs = [(flag, len(list(run))) for flag, run in itertools.groupby(trained)]
        lengths = [length for _, length in runs]
        return {"p": listed, "m": [0, *lengths] if runs and runs[0][0] else lengths}

    examples = [
        {"s": visible(row.source), "r": row.row, "f": row.fate, "w": list(row.warnings), "x": row.more}
        | encoded(row.tokens)
        for row in inspection.examples
    ]
    packed = [
        [{"s": visible(source), "r": number, **encoded(tokens)} for source, number, tokens in row]
        for row in inspection.packed
    ]
    return {"pieces": pieces, "examples": examples, "packed": packed}


def _names(tokenizer: Any, token: Token) -> str:
    """Names of a piece's tokens in the vocabulary, and of characters in its text that cannot be seen."""
    names: Sequence[str | None] = tokenizer.convert_ids_to_tokens(list(token.ids)) if tokenizer is not None else []
    unseen = [c for c in dict.fromkeys(token.text) if unicodedata.category(c) in ("Cc", "Cf") and c not in "\n\t"]
    told = [f"U+{ord(c):04X} {unicodedata.name(c, 'control character')}" for c in unseen]
    return "  ".join(filter(None, [visible(" ".join(map(str, names))), ", ".join(told)]))
