"""Show text from data without letting it act, in a terminal and in HTML pages; and write such pages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# Control characters become pictures. Line ends and tabs stay.
_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}
_PICTURES |= dict.fromkeys((*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)), 0xFFFD)  # C1, bidi


def visible(text: str) -> str:
    """Replace every control character by a picture of it; the length of the text stays."""
    return text.translate(_PICTURES)


def write_template(package: str, template: str, path: str | Path, **content: Any) -> Path:
    """Write an HTML page from a template of a package; text in `content` is escaped and made `visible`."""
    import jinja2  # here, because terminals need none of it

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(package),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # A bidi control in one name would turn round what follows. Markup is the page's own.
        finalize=lambda value: visible(value) if isinstance(value, str) and not hasattr(value, "__html__") else value,
    )
    environment.filters["figure"] = figure_text
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    page = environment.get_template(template).render(**content)
    path.write_bytes(page.encode("utf-8", "replace"))  # half a surrogate pair is no UTF-8
    return path


def figure_text(value: Any) -> str:
    """A number as people read it, nothing for None, anything else as text."""
    if value is None or isinstance(value, (bool, str)) or not isinstance(value, (int, float)):
        return "" if value is None else str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.5g}" if abs(value) < 1e6 else f"{value:.3e}"
