"""The report of a run: one HTML file that needs no network and no other file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from hf_objectives.diagnostics.batch_record import EVENT
from hf_objectives.diagnostics.curves import Curves, Log, read_curves
from hf_objectives.diagnostics.detect import diagnose, nothing_found
from hf_objectives.diagnostics.panels import FINDING_COLOURS, sources_of, with_perplexities
from hf_objectives.diagnostics.report_curves import bokeh_script, figures_of, rows_of
from hf_objectives.inspection import ENVIRONMENT, LABELS, SEVERITIES, Finding, script_hash, script_json, visible

_TEMPLATES = Path(__file__).parent / "templates"
_EVENTS_AT_MOST, _EXAMPLES_AT_MOST, _ROWS_AT_MOST = 20, 12, 20
_DEEPEST = 50  # levels of a JSON file
_TEXT_AT_MOST = 4_000  # characters of a document


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
        output: the HTML file.
        compare: another run: its curves are drawn over these, and its settings are compared.

    Returns:
        The path of the file.

    Raises:
        FileFormatError: there is no log, or nothing in it can be read.
        ConfigError: bokeh is not installed.
    """
    curves = read_curves(run)
    runs = [curves]
    if compare is not None:
        other = read_curves(compare)
        if other.name == curves.name:
            other = Curves(f"{other.name} (2)", other.series, other.notes, other.seams)
        runs.append(other)
    notes = list(curves.notes)
    # One logged step is no curve: a report of it still shows the settings and the labels.
    drawn = max(len(series.steps) for series in curves.series.values()) > 1
    findings = diagnose(curves) if drawn else []
    folder = _folder_of(run)
    environment: dict[str, Any] = (_read(folder / ENVIRONMENT, dict, notes) or {}) if folder else {}
    path = Path(output)
    content = {
        "name": curves.name,
        "other": runs[1].name if compare is not None else None,
        "summary": _summary(curves, findings),
        "findings": findings,
        "verdict": nothing_found(curves) if drawn else "The log has one step; findings need at least two.",
        "rows": rows_of(runs),
        "mixture": _mixture(curves),
        "perplexities": _perplexities(curves),
        "labels": _labels(folder, notes),
        "events": _events(folder, notes),
        "environment": _environment(environment),
        "settings": _flat(environment.get("settings")),
        "differences": None if compare is None else _differences(environment, _folder_of(compare), notes),
        "notes": notes,
    }
    page = _render(content, figures_of(runs, findings))
    path.parent.mkdir(parents=True, exist_ok=True)
    # A document may hold half a surrogate pair, which UTF-8 cannot.
    path.write_bytes(page.encode("utf-8", "replace"))
    return path


def _render(content: dict[str, Any], figures: dict[str, Any]) -> str:
    """The page. Its policy names the two scripts by their hashes: the browser runs no other."""
    scripts = [bokeh_script(), (_TEMPLATES / "report.js").read_text(encoding="utf-8")]
    jinja = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    jinja.filters["figure"] = _figure_text
    return jinja.get_template("report.html.jinja").render(
        **content,
        hashes=[script_hash(script) for script in scripts],
        colours=FINDING_COLOURS,
        style=Markup((_TEMPLATES / "report.css").read_text(encoding="utf-8")),
        bokeh=Markup(scripts[0]),
        script=Markup(scripts[1]),
        figures=Markup(script_json(figures)),
    )


def _shown(value: Any) -> Any:
    """Text with pictures for the characters that steer: a bidi control in one name would turn round what follows."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _figure_text(value: Any) -> str:
    """A number as people read it; anything else as text."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.5g}" if abs(value) < 1e6 else f"{value:.3e}"


def _summary(curves: Curves, findings: Sequence[Finding]) -> list[tuple[str, str, str]]:
    """Name, value and remark of what one looks for first."""
    longest = max(curves.series.values(), key=lambda one: int(one.steps[-1]))
    points = max(len(one.steps) for one in curves.series.values())
    cards = [("Steps", f"{int(longest.steps[-1]):,}", f"{points:,} logged")]
    for key, title in (
        ("loss", "Training loss"),
        ("eval_loss", "Validation loss"),
        ("perplexity", "Training perplexity"),
        ("eval_perplexity", "Validation perplexity"),
        ("tokens_per_second", "Tokens per second"),
    ):
        steps, values = curves.get(key)
        good = np.flatnonzero(np.isfinite(values))
        if not len(good):
            continue
        best = good[values[good].argmin()]
        said = f"best {_figure_text(float(values[best]))} at step {int(steps[best]):,}"
        if key == "tokens_per_second":
            cards.append((title, _figure_text(float(np.median(values[good]))), "median"))
        else:
            cards.append((title, _figure_text(float(values[good[-1]])), said))
    counts = [(severity, sum(one.severity == severity for one in findings)) for severity in reversed(SEVERITIES)]
    said = ", ".join(f"{count} {severity}" for severity, count in counts if count)
    return [*cards, ("Findings", str(len(findings)), said or "see below")]


def _mixture(curves: Curves) -> list[dict[str, Any]]:
    """The sources of a mixture: share asked for and share given at the end, and passes."""
    rows = []
    for source in sources_of([curves], "mixture/", "/share"):
        names = ("asked", "share", "epochs")
        rows.append({"source": source, **{name: _last(curves, f"mixture/{source}/{name}") for name in names}})
    return rows


def _perplexities(curves: Curves) -> list[dict[str, Any]]:
    completed, rows = with_perplexities(curves), []
    for source in sources_of([completed], "eval_", "_perplexity"):
        key = f"eval_{source}_perplexity"
        steps, values = completed.get(key)
        good = np.flatnonzero(np.isfinite(values))
        if len(good):
            best = good[values[good].argmin()]
            figures = {"first": float(values[good[0]]), "last": float(values[good[-1]]), "best": float(values[best])}
            rows.append({"source": source, "made": key in completed.made, **figures, "at": int(steps[best])})
    return rows


def _last(curves: Curves, key: str) -> float | None:
    values = curves.get(key).values
    good = values[np.isfinite(values)]
    return float(good[-1]) if len(good) else None


def _folder_of(run: Any) -> Path | None:
    """The output folder: that of a file, and the one above a checkpoint."""
    if not isinstance(run, (str, Path)):
        return None
    path = Path(run).resolve()
    folder = path if path.is_dir() else path.parent
    return folder.parent if folder.name.startswith("checkpoint-") else folder


def _read(path: Path, kind: type, notes: list[str]) -> Any:
    """A JSON file, None where there is none; one that cannot be read becomes a note: the rest is still worth showing."""
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        notes.append(f"{path.name} cannot be read ({error})")
        return None
    if _depth(content) > _DEEPEST:
        notes.append(f"{path.name} is nested more than {_DEEPEST} deep; it was left out")
        return None
    if isinstance(content, kind):
        return content
    notes.append(f"{path.name} holds {type(content).__name__}; expected {kind.__name__}")
    return None


def _depth(content: Any) -> int:
    """Levels of lists and mappings, no more counted than are allowed and one."""
    level, depth = [content], 0
    while level and depth <= _DEEPEST:
        depth += 1
        inner = [one.values() if isinstance(one, dict) else one for one in level if isinstance(one, (dict, list))]
        level = [one for values in inner for one in values]
    return depth


def _labels(folder: Path | None, notes: list[str]) -> list[dict[str, Any]]:
    rows = (_read(folder / LABELS, list, notes) or []) if folder else []
    shown = []
    for row in rows[:_ROWS_AT_MOST]:
        try:
            pieces = [(str(text), bool(trained)) for text, trained in row["pieces"]]
            shown.append({"source": row.get("source"), "pieces": pieces})
        except (KeyError, TypeError, ValueError, AttributeError):
            notes.append(f'{LABELS} holds {row!r:.80}; expected {{"source": ..., "pieces": [[text, trained], ...]}}')
    return shown


def _events(folder: Path | None, notes: list[str]) -> list[dict[str, Any]]:
    """What the live monitor wrote: the batches that stood out, by step, the examples with the greatest loss first."""
    events = []
    for path in folder.glob(f"diagnostics/*/{EVENT}") if folder else ():
        event = _read(path, dict, notes)
        if event is None:
            continue
        tables = [value for value in event.values() if isinstance(value, list)]
        examples = [one for table in tables for one in table if isinstance(one, dict) and "text" in one]
        # A document of which nothing is trained has no loss, and is nothing to look at before those that have one.
        examples.sort(key=lambda one: (not one.get("suspect"), one.get("loss") is None, -_number(one.get("loss"))))
        events.append(
            {
                "folder": path.parent.name,
                "step": event.get("step"),
                "kind": event.get("kind"),
                "loss": event.get("loss"),
                "examples": [
                    {
                        **{key: one.get(key) for key in ("source", "row", "loss")},
                        "text": str(one["text"])[:_TEXT_AT_MOST],
                    }
                    for one in examples[:_EXAMPLES_AT_MOST]
                ],
            }
        )
    events.sort(key=lambda one: _number(one["step"]))
    if len(events) > _EVENTS_AT_MOST:
        notes.append(f"of {len(events)} events of the monitor the first {_EVENTS_AT_MOST} are shown")
    return events[:_EVENTS_AT_MOST]


def _number(value: Any) -> float:
    try:
        number = float(value)  # of an event, "nan" and "inf" are texts
    except (TypeError, ValueError):
        return float("inf")
    return float("inf") if np.isnan(number) else number  # a loss that is NaN stands out most


def _environment(content: dict[str, Any]) -> list[tuple[str, str]]:
    versions = content.get("versions")
    pairs = list(versions.items()) if isinstance(versions, dict) else []
    pairs += [(key, value) for key, value in content.items() if key not in ("versions", "settings")]
    return [(str(key).replace("_", " "), "not installed" if value is None else str(value)) for key, value in pairs]


def _flat(settings: Any, prefix: str = "") -> dict[str, str]:
    """Settings by dotted name, as text."""
    if not isinstance(settings, dict):
        return {}
    flat: dict[str, str] = {}
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return flat


def _differences(
    environment: dict[str, Any], other: Path | None, notes: list[str]
) -> list[tuple[str, str, str]] | None:
    """Settings and versions that differ, by name; None where one of the runs has none."""
    content = _read(other / ENVIRONMENT, dict, notes) if other else None
    if not environment or not content:
        return None
    ours, theirs = _flat(environment), _flat(content)
    return [
        (key.removeprefix("settings."), ours.get(key, "not set"), theirs.get(key, "not set"))
        for key in sorted(ours.keys() | theirs.keys())
        if ours.get(key) != theirs.get(key)
    ]
