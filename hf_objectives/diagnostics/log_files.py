"""Read log lines from a file of any format: JSON, JSON lines, CSV, TensorBoard events, trackio's database."""

from __future__ import annotations

import csv
import re
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from hf_objectives.diagnostics.log_json import CHUNK, HISTORY, parse_object, read_history, read_json_lines
from hf_objectives.diagnostics.log_names import RUN_KEYS, canonical
from hf_objectives.errors import ConfigError, FileFormatError

Lines = Iterator[Mapping[str, Any]]
STATE = "trainer_state.json"
#: A curve that TensorBoard exported: the name of the file holds the run and the tag.
TAGGED = re.compile(r"(?P<run>.*)-tag-(?P<tag>.+)\.csv")
_EXAMPLE = '{"step": 1, "loss": 2.3}'


def read_lines(path: Path, notes: list[str]) -> Lines:
    """Yield the log lines of a file in the order in which they were written.

    Args:
        path: a log file.
        notes: gets a sentence about each thing that cannot be read, at the end of the iteration.

    Raises:
        FileFormatError: the file is empty, or its format is none of a log.
        ConfigError: the package that reads it is not installed.
    """
    with path.open("rb") as file:
        head = file.read(4096)
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
    text = head.decode("utf-8-sig", errors="replace").lstrip()
    if path.name == STATE or text.startswith("[") or HISTORY.search(head):
        return read_history
    if text.startswith("{") or path.suffix in (".jsonl", ".ndjson"):
        return read_history if _is_state(path) else read_json_lines
    raise FileFormatError(
        f"{path} is no log that is known; expected {STATE}, JSON lines, CSV, TensorBoard events or trackio's database"
    )


def _is_state(path: Path) -> bool:
    """Whether a file is a state under another name: an object over many lines, or a line with a log_history."""
    with path.open("rb") as file:
        first = file.readline(CHUNK)
    return first.strip(b"\xef\xbb\xbf \t\r\n") == b"{" or HISTORY.search(first) is not None


# -- CSV -----------------------------------------------------------------------------------------------------------


def _read_csv(path: Path, notes: list[str]) -> Lines:
    """Yield the rows of a table; also of those that Weights & Biases and TensorBoard export."""
    unreadable: list[tuple[int, str]] = []  # number of the line, and why
    ragged: list[int] = []
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
        tagged = TAGGED.fullmatch(path.name)
        if tagged and [name.lower() for name in names] == ["wall time", "step", "value"]:
            names[2] = _tag(tagged["tag"])
        side_by_side = len(names) > 1 and all(" - " in name for name in names[1:])
        to_lines = _wandb_lines if side_by_side else _table_lines
        yield from to_lines(names, _rows(reader, len(names), unreadable, ragged))
    if unreadable:
        lines = f"{len(unreadable):,} lines cannot be read and were left out"
        notes.append(f"{lines}, the first is line {unreadable[0][0]:,} ({unreadable[0][1]})")
    if ragged:
        notes.append(f"{len(ragged):,} lines have more or fewer cells than the header")
    if not ended:
        notes.append("the last line has no line end: it may be cut short")


def _rows(reader: Any, width: int, unreadable: list[tuple[int, str]], ragged: list[int]) -> Iterator[list[str]]:
    while True:
        try:
            for row in reader:
                if 0 < len(row) != width:
                    ragged.append(reader.line_num)
                yield row
            return
        except csv.Error as error:  # such as a cell of more than 128 KiB; the reader goes on with the next line
            unreadable.append((reader.line_num, str(error)))


def _table_lines(names: list[str], rows: Iterable[list[str]]) -> Lines:
    for row in rows:
        cells = zip(names, row, strict=False)
        yield {name: value for name, value in cells if value} if "" in row else dict(cells)


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
                if (entry := parse_object(metrics)) is not None:
                    yield {"step": step, **entry, RUN_KEYS[0]: run}
                else:
                    bad.append(step)
    except sqlite3.DatabaseError as error:
        raise FileFormatError(f"{path} is a database, but not one that trackio wrote ({error})") from error
    if not runs:
        raise FileFormatError(f"{path} holds no run")
    if bad:
        notes.append(f"{len(bad):,} rows are no JSON objects and were left out, the first is of step {bad[0]}")
