"""The files that training logs are kept in, each to its log lines: JSON, JSON lines, CSV, TensorBoard, trackio."""

from __future__ import annotations

import csv
import json
import re
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import orjson

from hf_objectives.diagnostics.log_names import RUN_KEYS, canonical
from hf_objectives.diagnostics.log_state import CHUNK, HISTORY, StateLines
from hf_objectives.diagnostics.log_table import LogTable, tables_by_run
from hf_objectives.errors import ConfigError, FileFormatError

STATE = "trainer_state.json"
#: Names of files that hold a log.
PATTERNS = ("*.jsonl", "*.ndjson", "*.csv", "*.tsv", "events.out.tfevents.*", "*.db", "*.sqlite", "*log*.json")
Contents = dict[str, tuple[LogTable, list[str]]]
#: A curve that TensorBoard exported: the run and the tag are in the name of the file.
TAGGED = re.compile(r"(?P<run>.*)-tag-(?P<tag>.+)\.csv")
_EXAMPLE = '{"step": 1, "loss": 2.3}'


def read_file(path: Path) -> Contents:
    """The runs in a log file by name, with what could not be read of each; "" is one that the file does not name.

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
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise FileFormatError(f"{path} is UTF-16; expected UTF-8, which iconv -f UTF-16 -t UTF-8 makes of it")
    text = head.decode("utf-8-sig", errors="replace").lstrip()
    if path.suffix in (".csv", ".tsv"):
        return _csv(path)
    if path.name == STATE or text.startswith("[") or HISTORY.search(text):
        return _state(path)
    if text.startswith("{") or path.suffix in (".jsonl", ".ndjson"):
        return _state(path) if _is_one_object(path) else _json_lines(path)
    raise FileFormatError(
        f"{path} is no log that is known; expected {STATE}, JSON lines, CSV, TensorBoard events or trackio's database"
    )


def _is_one_object(path: Path) -> bool:
    """Whether a file is a state under another name: an object over many lines, or a line with a log_history."""
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        first = file.readline(CHUNK)
    return first.strip() == "{" or HISTORY.search(first) is not None


def _state(path: Path) -> Contents:
    lines = StateLines(path)
    return {name: (table, lines.notes) for name, table in tables_by_run(lines).items()}


def _json_lines(path: Path) -> Contents:
    bad: list[tuple[int, bool]] = []

    def lines() -> Iterator[dict[str, Any]]:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                if (entry := _object(line)) is not None:
                    yield entry
                else:
                    bad.append((number, not line.endswith(b"\n")))

    tables = tables_by_run(lines())
    notes = []
    if bad and bad[-1][1]:
        notes.append(f"line {bad.pop()[0]:,}, the last, is cut short: the log is damaged there or still being written")
    if bad:
        notes.append(f"{len(bad):,} lines are no JSON objects and were left out, the first is line {bad[0][0]:,}")
    return {name: (table, notes) for name, table in tables.items()}


def _object(text: Any) -> dict[str, Any] | None:
    """What a line holds, where that is an object."""
    try:
        entry = orjson.loads(text)
    except orjson.JSONDecodeError:
        try:
            entry = json.loads(text)  # takes NaN and Infinity
        except (ValueError, TypeError, RecursionError):
            return None
    return entry if isinstance(entry, dict) else None


# -- tables --------------------------------------------------------------------------------------------------------


def _csv(path: Path) -> Contents:
    bad: list[tuple[int, str]] = []
    ragged = 0
    with path.open("rb") as raw:
        raw.seek(-1, 2)
        ended = raw.read(1) in b"\r\n"
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        header = file.readline()
        file.seek(0)
        reader = csv.reader(file, delimiter=max("\t;,", key=header.count))
        try:
            names = [name.strip() for name in next(reader)]
        except csv.Error as error:
            raise FileFormatError(f"{path}, line 1: {error}; expected the names of columns") from error

        def rows() -> Iterator[list[str]]:
            nonlocal ragged
            while True:
                try:
                    for row in reader:
                        ragged += 0 < len(row) != len(names)
                        yield row
                    return
                except csv.Error as error:  # the reader goes on with the next line
                    bad.append((reader.line_num, str(error)))

        tables = tables_by_run(_lines_of(path, names, rows()))
    notes = []
    if bad:
        number, reason = bad[0]
        notes.append(f"{len(bad):,} lines cannot be read and were left out, the first is line {number:,} ({reason})")
    if ragged:
        notes.append(f"{ragged:,} lines have more or fewer cells than the header")
    if not ended:
        notes.append("the last line has no line end: it may be cut short")
    return {name: (table, notes) for name, table in tables.items()}


def _lines_of(path: Path, names: list[str], rows: Iterable[list[str]]) -> Iterator[Mapping[str, Any]]:
    """Rows as log lines, also those of the tables that Weights & Biases and TensorBoard export."""
    if len(names) > 1 and all(" - " in name for name in names[1:]):
        yield from _side_by_side(names, rows)
        return
    if [name.lower() for name in names] == ["wall time", "step", "value"] and (tagged := TAGGED.fullmatch(path.name)):
        names = [*names[:2], _tag(tagged["tag"])]
    for row in rows:
        cells = zip(names, row, strict=False)
        yield {name: value for name, value in cells if value} if "" in row else dict(cells)


def _side_by_side(names: list[str], rows: Iterable[list[str]]) -> Iterator[Mapping[str, Any]]:
    """Runs side by side under `NAME - key`, each with the extremes of what was averaged for the picture."""
    columns: dict[str, list[tuple[int, str]]] = {}
    for i, name in enumerate(names[1:], 1):
        if not name.endswith(("__MIN", "__MAX")):
            run, key = name.rsplit(" - ", 1)
            columns.setdefault(run, []).append((i, key))
    for row in rows:
        for run, its in columns.items():
            if values := {key: row[i] for i, key in its if i < len(row) and row[i]}:
                yield {RUN_KEYS[0]: run, names[0]: row[0], **values}


def _tag(tag: str) -> str:
    """A tag from the name of a file, where TensorBoard writes _ in place of its first /."""
    slashed = tag.replace("_", "/", 1)
    return slashed if canonical(slashed) != slashed else tag


# -- trackers ------------------------------------------------------------------------------------------------------


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


def _trackio(path: Path) -> Contents:
    """Trackio's own reader wants the project by name in its own folder; the table is plain."""
    runs: Contents = {}
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as base:
            names = [name for (name,) in base.execute("select distinct run_name from metrics order by id")]
            for name in names:
                rows = base.execute("select step, metrics from metrics where run_name = ? order by id", (name,))
                runs[str(name)] = _trackio_run(rows)
    except sqlite3.DatabaseError as error:
        raise FileFormatError(f"{path} is a database, but not one that trackio wrote ({error})") from error
    if not runs:
        raise FileFormatError(f"{path} holds no run")
    return runs


def _trackio_run(rows: Iterable[tuple[Any, Any]]) -> tuple[LogTable, list[str]]:
    table, bad = LogTable(), []

    def lines() -> Iterator[dict[str, Any]]:
        for step, metrics in rows:
            if (entry := _object(metrics)) is not None:
                yield {"step": step, **entry}
            else:
                bad.append(step)

    table.extend(lines())
    notes = [f"{len(bad):,} rows are no JSON objects and were left out, the first is of step {bad[0]}"] if bad else []
    return table, notes
