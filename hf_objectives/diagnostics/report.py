"""Write the report of a run: one HTML file that needs no network, no script and no other file."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from hf_objectives.diagnostics.curves import Curves, Log, Series, read_curves
from hf_objectives.diagnostics.detect import diagnose, nothing_found
from hf_objectives.diagnostics.drawing import draw_panel, mark_findings, same_steps
from hf_objectives.diagnostics.panels import FINDING_COLOURS, panels_of, sources_of, with_perplexities
from hf_objectives.inspection import ENVIRONMENT, LABELS, SEVERITIES, Finding, figure_text, visible, write_template

_TEMPLATES = files(__package__) / "templates"
_EVENT = "event.json"  # as batch_record writes it, which is not imported here because it needs torch
_EVENTS_AT_MOST, _EXAMPLES_AT_MOST, _ROWS_AT_MOST = 20, 12, 20
_DEEPEST = 50  # levels of a JSON file
_TEXT_AT_MOST = 4_000  # characters of a document
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


def write_report(
    run: str | Path | Log | Curves,
    output: str | Path = "report.html",
    *,
    compare: str | Path | Log | Curves | None = None,
) -> Path:
    """Write the report of a run.

    Args:
        run: its output folder, a checkpoint, a log file, a Trainer's `log_history`, or curves. A folder's `labels.json`,
            `environment.json` and `diagnostics/*/event.json` are shown where they are there.
        output: the HTML file, whose path is returned.
        compare: another run: its curves are drawn over these, and its settings are compared.

    Raises:
        FileFormatError: there is no log, or nothing in it can be read.
    """
    curves = read_curves(run)
    runs = [curves]
    if compare is not None:
        other = read_curves(compare)
        runs.append(replace(other, name=f"{other.name} (2)") if other.name == curves.name else other)
    notes = list(curves.notes)
    # One logged step is no curve: a report of it still shows the settings and the labels.
    is_curve = curves.points > 1
    findings = diagnose(curves) if is_curve else []
    folder = run_folder(run)
    environment, settings = read_environment(folder, notes)
    return write_template(
        str(__package__),
        "report.html.jinja",
        output,
        style=Markup((_TEMPLATES / "report.css").read_text(encoding="utf-8")),
        colours=FINDING_COLOURS,
        name=curves.name,
        other=runs[1].name if compare is not None else None,
        summary=_summary(curves, findings),
        findings=findings,
        verdict=nothing_found(curves) if is_curve else "The log has one step; findings need at least two.",
        panels=list(draw_panels(runs, findings)),
        figures=_figures(runs),
        mixture=_mixture(curves),
        perplexities=_perplexities(curves),
        labels=read_labels(folder, notes),
        events=read_events(folder, notes),
        environment=environment,
        settings=settings,
        differences=None if compare is None else read_differences(folder, run_folder(compare), notes),
        notes=notes,
    )


# -- figures of the curves -----------------------------------------------------------------------------------------


def _extremes(series: Series) -> dict[str, Any]:
    """First, last, least and greatest finite value and their steps; empty where no value is finite."""
    good = np.isfinite(series.values)
    steps, values = series.steps[good], series.values[good]
    if not len(values):
        return {}
    least, most = values.argmin(), values.argmax()
    return {
        "first": float(values[0]),
        "last": float(values[-1]),
        "least": float(values[least]),
        "least_step": int(steps[least]),
        "most": float(values[most]),
        "most_step": int(steps[most]),
    }


def _summary(curves: Curves, findings: Sequence[Finding]) -> list[tuple[str, str, str]]:
    """Name, value and remark of what one looks for first."""
    last = max(int(series.steps[-1]) for series in curves.series.values())
    cards = [("Steps", f"{last:,}", f"{curves.points:,} logged")]
    for key, title in (
        ("loss", "Training loss"),
        ("eval_loss", "Validation loss"),
        ("perplexity", "Training perplexity"),
        ("eval_perplexity", "Validation perplexity"),
    ):
        if figures := _extremes(curves.get(key)):
            remark = f"best {figure_text(figures['least'])} at step {figures['least_step']:,}"
            cards.append((title, figure_text(figures["last"]), remark))
    speed = curves.get("tokens_per_second").values
    if np.isfinite(speed).any():
        cards.append(("Tokens per second", figure_text(float(np.median(speed[np.isfinite(speed)]))), "median"))
    counts = [(severity, sum(finding.severity == severity for finding in findings)) for severity in SEVERITIES[::-1]]
    remark = ", ".join(f"{count} {severity}" for severity, count in counts if count)
    return [*cards, ("Findings", str(len(findings)), remark or "see below")]


def _figures(runs: Sequence[Curves]) -> list[tuple[Any, ...]]:
    """A row for every curve that is drawn: its label, panel, points and extremes."""
    return [
        (line.label or "as asked", panel.title, len(line.series.values), *_extremes(line.series).values())
        for panel in panels_of(runs)
        for line in panel.lines
    ]


def _mixture(curves: Curves) -> list[tuple[Any, ...]]:
    """A row for every source of a mixture: share asked for and share given at the end, and epochs."""
    rows = []
    for source in sources_of([curves], "mixture/", "/share"):
        last = [_extremes(curves.get(f"mixture/{source}/{key}")).get("last") for key in ("asked", "share", "epochs")]
        rows.append((source, *("" if share is None else f"{share:.2%}" for share in last[:2]), last[2]))
    return rows


def _perplexities(curves: Curves) -> list[tuple[Any, ...]]:
    """A row for every source: first, last and least validation perplexity, and the step of the least."""
    completed, rows = with_perplexities(curves), []
    for source in sources_of([completed], "eval_", "_perplexity"):
        key = f"eval_{source}_perplexity"
        if figures := _extremes(completed.get(key)):
            made = Markup("<bdi>{}</bdi>, exp(loss)").format(visible(source))
            values = (figures[name] for name in ("first", "last", "least", "least_step"))
            rows.append((made if key in completed.made else source, *values))
    return rows


# -- panels ---------------------------------------------------------------------------------------------------------


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


# -- what stands beside the log -------------------------------------------------------------------------------------


def run_folder(run: Any) -> Path | None:
    """The output folder of a run: that of a file, and the one above a checkpoint; None where the run is no path."""
    if not isinstance(run, (str, Path)):
        return None
    path = Path(run).resolve()
    folder = path if path.is_dir() else path.parent
    return folder.parent if folder.name.startswith("checkpoint-") else folder


def read_labels(folder: Path | None, notes: list[str]) -> list[dict[str, Any]]:
    """The first rows of the label preview, each with its `source` and its `pieces`: text, and whether it is trained."""
    rows = []
    for row in _read(folder, LABELS, list, notes)[:_ROWS_AT_MOST]:
        try:
            pieces = [(str(text), bool(trained)) for text, trained in row["pieces"]]
            rows.append({"source": row.get("source"), "pieces": pieces})
        except (KeyError, TypeError, ValueError, AttributeError):
            notes.append(f'{LABELS} holds {row!r:.80}; expected {{"source": ..., "pieces": [[text, trained], ...]}}')
    return rows


def read_events(folder: Path | None, notes: list[str]) -> list[dict[str, Any]]:
    """The first events of the live monitor by step, the examples with the greatest loss first."""
    events = []
    for path in folder.glob(f"diagnostics/*/{_EVENT}") if folder else ():
        if event := _read(path.parent, _EVENT, dict, notes):
            tables = [value for value in event.values() if isinstance(value, list)]
            examples = [row for table in tables for row in table if isinstance(row, dict) and "text" in row]
            # Documents that have no loss, because nothing in them is trained, come last.
            examples.sort(key=lambda row: (not row.get("suspect"), row.get("loss") is None, -_number(row.get("loss"))))
            shown = [
                {**{key: row.get(key) for key in ("source", "row", "loss")}, "text": str(row["text"])[:_TEXT_AT_MOST]}
                for row in examples[:_EXAMPLES_AT_MOST]
            ]
            event = {key: event.get(key) for key in ("step", "kind", "loss")}
            events.append({**event, "folder": path.parent.name, "examples": shown})
    events.sort(key=lambda event: _number(event["step"]))
    if len(events) > _EVENTS_AT_MOST:
        notes.append(f"of {len(events)} events of the monitor the first {_EVENTS_AT_MOST} are shown")
    return events[:_EVENTS_AT_MOST]


def read_environment(folder: Path | None, notes: list[str]) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Versions and devices of a run, and its settings, each as pairs of name and text."""
    content = _read(folder, ENVIRONMENT, dict, notes)
    versions = content.get("versions")
    pairs = [*versions.items()] if isinstance(versions, dict) else []
    pairs += [(key, value) for key, value in content.items() if key not in ("versions", "settings")]
    shown = [(str(key).replace("_", " "), "not installed" if value is None else str(value)) for key, value in pairs]
    return shown, [*_flat(content.get("settings")).items()]


def read_differences(ours: Path | None, theirs: Path | None, notes: list[str]) -> list[tuple[str, str, str]] | None:
    """Settings and versions that differ between two runs, by name; None where one of the runs has none."""
    left, right = (
        _flat(_read(folder, ENVIRONMENT, dict, notes if folder == theirs else [])) for folder in (ours, theirs)
    )
    if not left or not right:
        return None
    return [
        (key.removeprefix("settings."), left.get(key, "not set"), right.get(key, "not set"))
        for key in sorted(left.keys() | right.keys())
        if left.get(key) != right.get(key)
    ]


def _flat(settings: Any, prefix: str = "") -> dict[str, str]:
    """Settings by dotted name, as text."""
    flat: dict[str, str] = {}
    for key, value in settings.items() if isinstance(settings, dict) else ():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return flat


def _read(folder: Path | None, name: str, kind: type, notes: list[str]) -> Any:
    """A JSON file, empty where there is none. One that cannot be read becomes a note: the rest is still worth showing."""
    if folder is None or not (folder / name).is_file():
        return kind()
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        notes.append(f"{name} cannot be read ({error})")
        return kind()
    if _is_deeper(content, _DEEPEST):
        notes.append(f"{name} is nested more than {_DEEPEST} deep; it was left out")
    elif not isinstance(content, kind):
        notes.append(f"{name} holds {type(content).__name__}; expected {kind.__name__}")
    else:
        return content
    return kind()


def _is_deeper(content: Any, levels: int) -> bool:
    inner = content.values() if isinstance(content, dict) else content if isinstance(content, list) else ()
    return levels == 0 or any(_is_deeper(value, levels - 1) for value in inner)


def _number(value: Any) -> float:
    try:
        number = float(value)  # of an event, "nan" and "inf" are texts
    except (TypeError, ValueError):
        return float("inf")
    return float("inf") if np.isnan(number) else number  # a loss that is NaN stands out most
