"""The files that training logs are kept in, each to its log lines: JSON, JSON lines, CSV, TensorBoard, trackio."""

from __future__ import annotations

import csv
import json
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import orjson

from hf_objectives.diagnostics.log_table import LogTable
from hf_objectives.errors import ConfigError, FileFormatError

STATE = "trainer_state.json"
#: Names of files that hold a log.
PATTERNS = ("*.jsonl", "*.ndjson", "*.csv", "*.tsv", "events.out.tfevents.*", "*.db", "*.sqlite", "*log*.json")
_HISTORY = re.compile(r'"log_history"\s*:\s*\[')
_CHUNK = 1 << 22  # characters
_GAP = re.compile(r"[\s,]*")


def read_file(path: Path) -> dict[str, tuple[LogTable, list[str]]]:
    """The runs in a log file by name, with what could not be read of each.

    Raises:
        FileFormatError: the file is empty, or nothing that a log is kept in.
        ConfigError: a package is missing that reads it.
    """
    with path.open("rb") as file:
        head = file.read(4096)
    if not head.strip():
        raise FileFormatError(f"{path} is empty; a log has lines such as {_EXAMPLE}")
    if head.startswith(b"SQLite format 3"):
        return _trackio(path)
    if "tfevents" in path.name:
        return {"": _tensorboard(path)}
    text = head.decode("utf-8-sig", errors="replace").lstrip()
    if path.suffix in (".csv", ".tsv"):
        return {"": _csv(path)}
    if text.startswith("[") or _HISTORY.search(text) or (path.name == STATE):
        return {"": _json_array(path)}
    if text.startswith("{") or path.suffix in (".jsonl", ".ndjson"):
        # A state file whose history stands further down than its head has one object over many lines.
        first = text.split("\n", 1)[0].strip()
        return {"": _json_array(path) if first == "{" else _json_lines(path)}
    raise FileFormatError(
        f"{path} is no log that is known; expected {STATE}, JSON lines, CSV, TensorBoard events or trackio's database"
    )


_EXAMPLE = '{"step": 1, "loss": 2.3}'


def _json_lines(path: Path) -> tuple[LogTable, list[str]]:
    table, bad = LogTable(), []

    def lines() -> Iterator[dict[str, Any]]:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    entry = orjson.loads(line)
                except orjson.JSONDecodeError:
                    try:
                        entry = json.loads(line)  # takes NaN and Infinity
                    except ValueError:
                        entry = None
                if isinstance(entry, dict):
                    yield entry
                else:
                    bad.append((number, not line.endswith(b"\n")))

    table.extend(lines())
    notes = []
    if bad and bad[-1][1]:
        notes.append(f"line {bad.pop()[0]:,}, the last, is cut short: the log is damaged there or still being written")
    if bad:
        notes.append(f"{len(bad):,} lines are no JSON objects and were left out, the first is line {bad[0][0]:,}")
    return table, notes


def _json_array(path: Path) -> tuple[LogTable, list[str]]:
    """The objects of a state's `log_history`, or of an array of log lines; as far as the file goes."""
    table, notes = LogTable(), []

    def entries() -> Iterator[dict[str, Any]]:
        decode = json.JSONDecoder().raw_decode
        with path.open(encoding="utf-8-sig", errors="replace") as file:
            text = file.read(_CHUNK)
            while (found := _HISTORY.search(text)) is None and not text.lstrip().startswith("["):
                more = file.read(_CHUNK)
                if not more:
                    notes.append("it has no log_history")
                    return
                text += more
            at = found.end() if found else text.index("[") + 1
            whole = 0  # up to here whole objects were taken at once
            while True:
                at = _GAP.match(text, at).end()  # type: ignore[union-attr]
                if text[at : at + 1] == "]":
                    return
                if at >= whole and (cut := text.rfind("}", at) + 1):
                    # Many objects at once, an order faster; one by one where that fails, as at the end and at a NaN.
                    whole = cut
                    try:
                        some = orjson.loads(f"[{text[at:cut]}]")
                    except orjson.JSONDecodeError:
                        some = None
                    if some and all(isinstance(entry, dict) for entry in some):
                        yield from some
                        at = cut
                        continue
                try:
                    entry, end = decode(text, at)
                except ValueError as error:
                    more = file.read(_CHUNK)
                    if not more:
                        notes.append(
                            f"it ends in the middle of its log ({error.args[0].split(':')[0].lower()}): damaged there or "
                            "still being written; the lines before were read"
                        )
                        return
                    text, at, whole = text[at:] + more, 0, 0
                    continue
                at = end
                if not isinstance(entry, dict):
                    notes.append(f"an entry of the log is no object: {str(entry)[:60]}")
                    continue
                yield entry

    table.extend(entries())
    return table, notes


def _csv(path: Path) -> tuple[LogTable, list[str]]:
    table, ragged = LogTable(), 0
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        header = file.readline()
        file.seek(0)
        delimiter = max("\t;,", key=header.count)

        def rows() -> Iterator[dict[str, Any]]:
            nonlocal ragged
            for row in csv.DictReader(file, delimiter=delimiter):
                ragged += None in row or None in row.values()
                yield {key.strip(): value for key, value in row.items() if key is not None and value not in (None, "")}

        table.extend(rows())
    return table, [f"{ragged:,} lines have more or fewer cells than the header"] if ragged else []


def _tensorboard(path: Path) -> tuple[LogTable, list[str]]:
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError as error:
        raise ConfigError(
            f"{path} is of TensorBoard, whose package reads it: pip install 'hf-objectives[tensorboard]'"
        ) from error
    # All points, and in the order written: which of them a resumed run replaced is decided for all formats in one place.
    events = EventAccumulator(str(path), size_guidance={"scalars": 0}, purge_orphaned_data=False)
    events.Reload()
    table = LogTable()
    rows: list[tuple[float, int, str, float]] = []
    for tag in events.Tags()["scalars"]:
        rows += [(event.wall_time, event.step, tag, event.value) for event in events.Scalars(tag)]
    rows.sort(key=lambda row: row[0])
    table.extend({"step": step, tag: value} for _, step, tag, value in rows)
    return table, []


def _trackio(path: Path) -> dict[str, tuple[LogTable, list[str]]]:
    """Trackio's own reader wants the project by name in its own folder; the table is plain."""
    runs: dict[str, tuple[LogTable, list[str]]] = {}
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as base:
            names = [name for (name,) in base.execute("select distinct run_name from metrics order by id")]
            for name in names:
                table = LogTable()
                rows = base.execute("select step, metrics from metrics where run_name = ? order by id", (name,))
                table.extend({"step": step, **json.loads(metrics)} for step, metrics in rows)
                runs[name] = table, []
    except sqlite3.DatabaseError as error:
        raise FileFormatError(f"{path} is a database, but not one that trackio wrote ({error})") from error
    if not runs:
        raise FileFormatError(f"{path} holds no run")
    return runs
