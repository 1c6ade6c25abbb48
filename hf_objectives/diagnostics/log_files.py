"""Read log lines from a file of any format: JSON, JSON lines, CSV, TensorBoard events, trackio's database."""

from __future__ import annotations

import csv
import json
import re
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import orjson

from hf_objectives.diagnostics.log_names import RUN_KEYS, canonical
from hf_objectives.errors import ConfigError, FileFormatError

Lines = Iterator[Mapping[str, Any]]
STATE = "trainer_state.json"
#: A curve that TensorBoard exported: the name of the file holds the run and the tag.
TAGGED = re.compile(r"(?P<run>.*)-tag-(?P<tag>.+)\.csv")
_HEAD, _FORE = 1 << 20, 1 << 12  # bytes that tell the format of a file, and those in which a state begins its log
_EXAMPLE = '{"step": 1, "loss": 2.3}'
CHUNK = 1 << 22  # bytes of a state that are parsed at once
_HISTORY = re.compile(rb'"log_history"\s*:\s*\[')
_ARRAY = re.compile(rb"(?:\xef\xbb\xbf)?\s*\[")
_BETWEEN = re.compile(r"(?<=\})\s*,\s*(?=\{)")
_BEGIN = re.compile(rb'\s*(\{\s*"[^"]*")')
_CLOSED = re.compile(r"[}\s]\]\s*(?:[,}]|$)")
_DECODER = json.JSONDecoder()
_DAMAGE = object()


def read_lines(path: Path, notes: list[str]) -> Lines:
    """Yield the log lines of a file in order. At the end `notes` gets a sentence about each thing that cannot be read.

    Raises:
        FileFormatError: the file is empty, or its format is none of a log.
        ConfigError: the package that reads it is not installed.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD)
    if not head.strip():
        raise FileFormatError(f"{path} is empty; a log has lines such as {_EXAMPLE}")
    return _reader_of(path, head)(path, notes)


def _reader_of(path: Path, head: bytes) -> Callable[[Path, list[str]], Lines]:
    """The function that reads a file with these first bytes."""
    if head.startswith(b"SQLite format 3"):
        return _read_trackio
    if "tfevents" in path.name:
        return _read_tensorboard
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise FileFormatError(f"{path} is UTF-16; expected UTF-8, which iconv -f UTF-16 -t UTF-8 makes of it")
    if path.suffix in (".csv", ".tsv"):
        return _read_csv
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    first = text.partition(b"\n")[0]
    # A state may have any name: an object over many lines, or one line with a log_history.
    is_state = first.strip() == b"{" or _HISTORY.search(text, 0, max(_FORE, len(first)))
    if path.name == STATE or text.startswith(b"[") or is_state:
        return _read_history
    if text.startswith(b"{") or path.suffix in (".jsonl", ".ndjson"):
        return _read_json_lines
    raise FileFormatError(
        f"{path} is no log that is known; expected {STATE}, JSON lines, CSV, TensorBoard events or trackio's database"
    )


# -- JSON ----------------------------------------------------------------------------------------------------------


def _parse_object(text: Any) -> dict[str, Any] | None:
    """One JSON object, which may hold NaN and Infinity; None where `text` is no such object."""
    try:
        entry = orjson.loads(text)
    except orjson.JSONDecodeError:
        try:
            entry = json.loads(text)  # accepts NaN and Infinity
        except (ValueError, TypeError, RecursionError):
            return None
    return entry if isinstance(entry, dict) else None


def _read_json_lines(path: Path, notes: list[str]) -> Lines:
    bad: list[tuple[int, bool]] = []  # number of the line, and whether it has a line end
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            if (entry := _parse_object(line)) is not None:
                yield entry
            else:
                bad.append((number, line.endswith(b"\n")))
    if bad and not bad[-1][1]:
        notes.append(f"line {bad.pop()[0]:,}, the last, is cut short: the log is damaged there or still being written")
    if bad:
        notes.append(f"{len(bad):,} lines are no JSON objects and were left out, the first is line {bad[0][0]:,}")


def _read_history(path: Path, notes: list[str]) -> Lines:
    """Yield the entries of a state's `log_history`, or of an array of log lines, also those behind damage.

    A million entries at once would take a gigabyte, so the text is parsed in pieces that end between two entries.
    """
    text = path.read_bytes()
    opened = _ARRAY.match(text) or _HISTORY.search(text)
    if opened is None:
        notes.append("it has no log_history")
        return
    # A piece ends before an entry that begins as the first one does: an object inside of an entry begins otherwise.
    begin = _BEGIN.match(text, opened.end())
    between = re.compile(rb"(?<=\})\s*,\s*(?=" + (re.escape(begin[1]) if begin else rb"\{") + rb")")
    damage: list[str] = []  # where
    odd: list[Any] = []  # entries that are no objects
    step, start, rest, entry = None, opened.end(), "", None
    while start < len(text) and not rest.startswith("]"):
        cut = between.search(text, start + CHUNK)
        entries, rest = _parse_entries(text[start : cut.start() if cut else None])
        start = cut.end() if cut else len(text)
        for entry in entries:
            if isinstance(entry, dict):
                step = entry.get("step", step)
                yield entry
            elif entry is _DAMAGE:
                damage.append("at its start" if step is None else f"after step {step}")
            else:
                odd.append(entry)
    ended = rest.startswith("]") or bool(_CLOSED.search(rest) and rest.rstrip().endswith(("}", "]")))
    if not ended and entry is _DAMAGE:
        damage.pop()
    if damage:
        places = f"{len(damage):,} place" + ("s, the first" if len(damage) > 1 else ",")
        notes.append(f"it is damaged in {places} {damage[0]}: what stood there was left out")
    if not ended:
        notes.append("it ends in the middle of its log (damaged or still being written); the lines before were read")
    if odd:
        notes.append(f"{len(odd):,} entries of the log are no objects, the first is {str(odd[0])[:60]}")


def _parse_entries(piece: bytes) -> tuple[list[Any], str]:
    """The entries in a piece of the text, `_DAMAGE` for each that cannot be read, and the text behind the last one.

    Where the last one is damaged, the rest begins with it. At the end of the log the rest begins with its bracket.
    """
    try:
        return orjson.loads(b"[" + piece + b"]"), ""
    except orjson.JSONDecodeError:  # a NaN, damage, or the end of the log
        text = piece.decode("utf-8", errors="replace")
    try:
        entries, end = _DECODER.raw_decode(f"[{text}]")
        return entries, text[end - 2 :]
    except (ValueError, RecursionError):
        entries, rest = [], ""
    for part in _BETWEEN.split(text):
        rest = part.lstrip()
        with suppress(ValueError, RecursionError):  # what cannot be read stays in `rest`, and counts as damage below
            entry, end = _DECODER.raw_decode(rest)
            entries.append(entry)
            rest = rest[end:].lstrip(" \t\r\n,")
        if rest.startswith("]"):
            break
        if rest:
            entries.append(_DAMAGE)
    return entries, rest


# -- CSV -----------------------------------------------------------------------------------------------------------


def _read_csv(path: Path, notes: list[str]) -> Lines:
    """Yield the rows of a table; also of those that Weights & Biases and TensorBoard export."""
    unreadable: list[tuple[int, str]] = []  # number of the line, and why
    ragged: list[int] = []  # numbers of lines
    with path.open("rb") as raw:
        raw.seek(-1, 2)
        ended = raw.read(1) in b"\r\n"
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        header = file.readline()
        file.seek(0)
        reader = csv.reader(file, delimiter=max("\t;,", key=header.count))
        try:
            names = [name.strip() for name in next(reader)]
        except StopIteration:  # a byte order mark and nothing more
            raise FileFormatError(f"{path} holds no lines; expected the names of columns") from None
        except csv.Error as error:
            raise FileFormatError(f"{path}, line 1: {error}; expected the names of columns") from error
        tagged = TAGGED.fullmatch(path.name)
        if tagged and [name.lower() for name in names] == ["wall time", "step", "value"]:
            names[2] = _tag(tagged["tag"])
        side_by_side = len(names) > 1 and all(" - " in name for name in names[1:])
        to_lines = _wandb_lines if side_by_side else _table_lines
        yield from to_lines(names, _rows(reader, len(names), unreadable, ragged))
    if unreadable:
        number, why = unreadable[0]
        lines = f"{len(unreadable):,} lines cannot be read and were left out"
        notes.append(f"{path.name}: {lines}, the first is line {number:,} ({why})")
    if ragged:
        lines = f"{len(ragged):,} lines have more or fewer cells than the header"
        notes.append(f"{path.name}: {lines}, the first is line {ragged[0]:,}")
    if not ended:
        notes.append("the last line has no line end: it may be cut short")


def _rows(reader: Any, width: int, unreadable: list[tuple[int, str]], ragged: list[int]) -> Iterator[list[str]]:
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:  # such as a cell of more than 128 KiB; the reader goes on with the next line
            unreadable.append((reader.line_num, str(error)))
            continue
        if row is None:
            return
        if 0 < len(row) != width:
            ragged.append(reader.line_num)
        yield row


def _table_lines(names: list[str], rows: Iterable[list[str]]) -> Lines:
    return ({name: value for name, value in zip(names, row, strict=False) if value} for row in rows)


def _wandb_lines(names: list[str], rows: Iterable[list[str]]) -> Lines:
    """Runs side by side in columns `RUN - key`; the extremes (`__MIN`, `__MAX`) of what was averaged are no curves."""
    columns: dict[str, list[tuple[int, str]]] = {}
    for i, name in enumerate(names[1:], 1):
        if not name.endswith(("__MIN", "__MAX")):
            run, key = name.rsplit(" - ", 1)
            columns.setdefault(run, []).append((i, key))
    for row in rows:
        for run, keys in columns.items():
            if values := {key: row[i] for i, key in keys if i < len(row) and row[i]}:
                yield {RUN_KEYS[0]: run, names[0]: row[0], **values}


def _tag(tag: str) -> str:
    """A tag from the name of a file, where TensorBoard writes _ in place of its first /."""
    slashed = tag.replace("_", "/", 1)
    return slashed if canonical(slashed) != slashed else tag


# -- trackers ------------------------------------------------------------------------------------------------------


def _read_tensorboard(path: Path, notes: list[str]) -> Lines:
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError as error:
        raise ConfigError(
            f"{path} is of TensorBoard, whose package reads it: pip install 'hf-objectives[tensorboard]'"
        ) from error
    # Take every point in the order written: LogTable decides for all formats what a resumed run replaced.
    events = EventAccumulator(str(path), size_guidance={"scalars": 0}, purge_orphaned_data=False)
    events.Reload()
    points = [
        (point.wall_time, {"step": point.step, tag: point.value})
        for tag in events.Tags()["scalars"]
        for point in events.Scalars(tag)
    ]
    yield from (line for _, line in sorted(points, key=lambda point: point[0]))


def _read_trackio(path: Path, notes: list[str]) -> Lines:
    """Read the table itself: trackio's own reader finds a project only by its name and in its own folder."""
    bad = []
    runs = False
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as base:
            for run, step, metrics in base.execute("select run_name, step, metrics from metrics order by id"):
                runs = True
                if (entry := _parse_object(metrics)) is not None:
                    yield {"step": step, **entry, RUN_KEYS[0]: run}
                else:
                    bad.append(step)
    except sqlite3.DatabaseError as error:
        raise FileFormatError(f"{path} is a database, but not one that trackio wrote ({error})") from error
    if not runs:
        raise FileFormatError(f"{path} holds no run")
    if bad:
        notes.append(f"{len(bad):,} rows are no JSON objects and were left out, the first is of step {bad[0]}")
