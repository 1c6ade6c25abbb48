"""Read what stands beside the log of a run: label preview, environment, events of the monitor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from hf_objectives.inspection import ENVIRONMENT, LABELS

_EVENT = "event.json"  # as batch_record writes it, which is not imported here because it needs torch
_EVENTS_AT_MOST, _EXAMPLES_AT_MOST, _ROWS_AT_MOST = 20, 12, 20
_DEEPEST = 50  # levels of a JSON file
_TEXT_AT_MOST = 4_000  # characters of a document


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
