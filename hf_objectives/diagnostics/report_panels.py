"""Draw the panels of a report as SVG that stands inside an HTML page and takes its colours."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from typing import Any

from markupsafe import Markup

from hf_objectives.diagnostics.curves import Curves
from hf_objectives.diagnostics.drawing import draw_panel, mark_findings, same_steps
from hf_objectives.diagnostics.panels import FINDING_COLOURS, panels_of
from hf_objectives.inspection import Finding

_SIZE = (4.2, 2.5)  # inches; small, so that text is readable where a phone shows a panel at its width
_TEXT, _GRID = "#010203", "#040506"  # stand for the page's colours until the SVG is written
_COLOURS = {
    _TEXT: "currentColor",
    _GRID: "var(--line)",
    "#ffffff": "var(--back)",
    **{light: f"var(--{severity})" for severity, (light, _) in FINDING_COLOURS.items()},
}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text, for search and for screen readers
    "svg.hashsalt": "hf_objectives",  # the same ids in every report of a log
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _TEXT),
    "grid.color": _GRID,
}


def draw_panels(runs: Sequence[Curves], findings: Sequence[Finding]) -> Iterator[tuple[str, Markup]]:
    """Yield title and SVG of each panel of `panels_of`.

    Args:
        runs: the run, and those to compare it with.
        findings: of the run, the gravest first; each is marked by its number in the panels that show it.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        panels = panels_of(runs)
        figures = {panel.name: Figure(figsize=_SIZE, layout="constrained") for panel in panels}
        axes = {name: figure.subplots() for name, figure in figures.items()}
        for panel in panels:
            draw_panel(axes[panel.name], panel)
        same_steps(axes.values(), runs)
        mark_findings(axes, findings)
        for panel in panels:
            axes[panel.name].set_title("", loc="left")  # the page writes it
            title = panel.title + (" (log scale)" if axes[panel.name].get_yscale() == "log" else "")
            yield title, _inline_svg(figures[panel.name], title)


def _inline_svg(figure: Any, title: str) -> Markup:
    """A figure as an SVG element for a page: without size, style sheet and names of its own."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue()
    view = " ".join(f"{72 * inches:g}" for inches in (0, 0, *_SIZE))  # in points
    body = svg[svg.index(">", svg.index("<svg")) + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r' id="[\w.]+_\d+"', "", body)  # of groups, the same in every figure
    body = re.sub("|".join(_COLOURS), lambda found: _COLOURS[found[0]], body)
    head = Markup('<svg viewBox="{}" role="img" aria-label="{}">').format(view, title)
    return head + Markup(body)
