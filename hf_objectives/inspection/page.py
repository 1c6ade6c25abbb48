"""Write an inspection as one HTML page. It needs no network and no library, and text from data is never read as markup."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import unicodedata
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from markupsafe import Markup

from hf_objectives.inspection.rows import QUANTILES, Inspection
from hf_objectives.inspection.safe_text import visible, write_template
from hf_objectives.inspection.token_texts import Token

_TEMPLATES = files(__package__) / "templates"


def write_page(inspection: Inspection, path: str | Path, tokenizer: Any = None) -> Path:
    """Write an inspection as one HTML page (.html), and return its path.

    Without a tokenizer, which gives the names of tokens in its vocabulary, only their texts and ids are shown.
    """
    script = (_TEMPLATES / "inspection.js").read_text(encoding="utf-8")
    # The page's policy names the hash of its one script. A browser hashes line ends as it reads them.
    digest = hashlib.sha256(script.replace("\r\n", "\n").replace("\r", "\n").encode()).digest()
    # Nothing in the data ends the script element or begins a comment.
    data = json.dumps(page_data(inspection, tokenizer), allow_nan=False)
    for character in "<>&":
        data = data.replace(character, f"\\u{ord(character):04x}")
    return write_template(
        str(__package__),
        "inspection.html.jinja",
        path,
        one=inspection,
        figures=inspection.statistics,
        quantiles=list(zip(QUANTILES, inspection.statistics.quantiles, strict=True)),
        most=max(count for _, _, count in inspection.histogram),
        data=Markup(data),
        script=Markup(script),
        hash=Markup(f"'sha256-{base64.b64encode(digest).decode()}'"),
    )


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
