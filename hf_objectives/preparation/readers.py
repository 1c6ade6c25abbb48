"""Read records: the rows of a segment of a file, or all rows of a name."""

from __future__ import annotations

import codecs
import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import compress
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset
from numpy.typing import NDArray

from hf_objectives.errors import DataError, FileFormatError
from hf_objectives.preparation import files
from hf_objectives.preparation.files import DOCUMENTS, Segment, count_lines, kind_of, open_file
from hf_objectives.preparation.json_array import bad_byte, elements
from hf_objectives.preparation.places import Place, local_files
from hf_objectives.types import parse_json

_SKIPPED_NAMED = 5


@dataclass(frozen=True, slots=True)
class Records:
    """Some records: the rows, the number of each (see `Segment.first`), and the text of each where orjson parsed it."""

    rows: list[dict[str, Any]]
    numbers: list[int]
    texts: list[bytes] = field(default_factory=list)

    def part(self, chosen: NDArray) -> Records:
        """The records that a bool array [records] chooses."""
        return Records(list(compress(self.rows, chosen)), list(compress(self.numbers, chosen)))


@dataclass(slots=True)
class Skipped:
    """Broken records that were left out: how many, and the messages of the first few."""

    count: int = 0
    named: list[str] = field(default_factory=list)

    def add(self, error: Exception) -> None:
        """Count one record."""
        self.count += 1
        if len(self.named) < _SKIPPED_NAMED:
            self.named.append(str(error))


def load_rows(
    name: str | Place, *, split: str = "train", documents: str = "blank_line"
) -> list[dict[str, Any]] | Dataset:
    """Load all rows of local files, or a dataset of the Hub.

    JSON is read as Python values, not as an Arrow table, so tools with different parameters keep their own keys.

    Args:
        name: a file, folder or glob (.json, .jsonl, .parquet, .txt, plain or with .gz or .zst), or a dataset's id on the
            Hub, or an address of an object store; a `Place` says more.
        split: split of a Hub dataset, where `name` is no `Place`.
        documents: how a text file is cut into documents: "blank_line", "line" or "file".

    Raises:
        FileFormatError: a file is missing, empty or not what its name says; names file and line.
        ConfigError: the ending of a file is not known, or see `Place`.
    """
    place = name if isinstance(name, Place) else Place(name, split)
    if place.on_hub:
        rows = place.load_dataset()
        return place.rename(list(rows) if place.streaming else rows)
    rows = []
    for file in local_files(place.path):
        for records in read_segment(files.whole_file("", file, documents)):
            rows += records.rows
    if not rows:
        raise FileFormatError(f"{place.path} holds no rows")
    return place.rename(rows)


@contextlib.contextmanager
def naming_places(paths: Mapping[str, str], documents: str = "blank_line") -> Iterator[None]:
    """Add file and line to an error about a row that `load_rows` read; `paths` are the names given to it, by source.

    The files are read again to find the line, once the error is there.
    """
    try:
        yield
    except DataError as error:
        path = paths.get(error.source or "")
        if path is not None and error.row is not None and (place := _place(path, error.row, documents)):
            error.reason = f"{error.reason} ({place})"
        raise


def _place(name: str, row: int, documents: str) -> str | None:
    """File and line of a row of `load_rows`; None for a dataset of the Hub, and for a row that has a number of its own."""
    left = row
    for file in [] if files.is_hub_id(name) else local_files(name):
        segment = files.whole_file("", file, documents)
        for records in read_segment(segment):
            if left < len(records.rows):
                own = records.rows[left].get("row")
                return segment.place(records.numbers[left]) if own in (None, row) else None
            left -= len(records.rows)
    return None


def read_segment(
    segment: Segment, *, skipped: Skipped | None = None, read_bytes: int | None = None
) -> Iterator[Records]:
    """Yield the records of a segment, about `read_bytes` at a time, `files.READ_BYTES` by default.

    Records that cannot be read are counted in `skipped` and left out; None makes the first one an error.

    Raises:
        FileFormatError: the file vanished, changed or ends too soon, or a record is broken; names file and line.
    """
    try:
        stat = Path(segment.path).stat()
        if (stat.st_size, stat.st_mtime_ns) != (segment.size, segment.mtime_ns):
            raise FileFormatError(f"{segment.path} changed while it was prepared; run again when it is complete")
        yield from READERS[kind_of(segment.path) or ""](segment, skipped, read_bytes or files.READ_BYTES)
    except FileNotFoundError as error:
        _report(FileFormatError(f"{segment.path} vanished while it was prepared"), skipped, error)
    except FileFormatError as error:
        _report(error, skipped, error.__cause__)


def _report(error: FileFormatError, skipped: Skipped | None, cause: BaseException | None = None) -> None:
    if skipped is None:
        raise error from cause
    skipped.add(error)


# -- lines -----------------------------------------------------------------------------------------------------------


def _read_chunks(segment: Segment, separator: bytes | None, read_bytes: int) -> Iterator[tuple[int, bytes]]:
    """Yield whole records, some megabytes at a time: the line of the first, and the bytes."""
    line = segment.first
    with open_file(segment.path) as file:
        if segment.begin:
            file.seek(segment.begin)
        left = None if segment.end is None else segment.end - segment.begin
        while left is None or left > 0:
            size = read_bytes if left is None else min(read_bytes, left)
            try:
                chunk = file.read(files.MAX_RECORD + 1) if separator is None else file.read(size)
                if separator is None and len(chunk) > files.MAX_RECORD:
                    raise FileFormatError(files.TOO_LONG)
                if separator is not None and (left is None or size < left):
                    chunk += files.read_to_separator(file, chunk, separator)
            except FileFormatError as error:
                last = line + chunk.count(b"\n") + 1
                raise FileFormatError(f"{segment.path}, line {last}: {error.reason}") from None
            except OSError as error:
                reason = f"the compressed file is damaged or ends too soon, after line {line} ({error})"
                raise FileFormatError(f"{segment.path}: {reason}") from error
            if not chunk:
                if left:
                    raise FileFormatError(f"{segment.path} ends {left} bytes too soon, after line {line}")
                return
            first = segment.begin == 0 and line == segment.first
            yield line, chunk.removeprefix(codecs.BOM_UTF8) if first else chunk
            line += count_lines(chunk)
            left = None if left is None else left - len(chunk)


def _read_json_lines(segment: Segment, skipped: Skipped | None, read_bytes: int) -> Iterator[Records]:
    for line, chunk in _read_chunks(segment, b"\n", read_bytes):
        texts = chunk.split(b"\n")
        if not texts[-1]:
            texts.pop()
        try:  # nearly always: one object a line, at the speed of the parser
            rows = list(map(orjson.loads, texts))
        except orjson.JSONDecodeError:
            rows = []
        if set(map(type, rows)) == {dict}:
            yield Records(rows, list(range(line, line + len(rows))), texts)
            continue
        records = Records([], [])
        for number, text in enumerate(texts, line):
            if text and not text.isspace():
                try:
                    records.rows.append(_read_object(text))
                    records.numbers.append(number)
                except ValueError as error:
                    _report(FileFormatError(f"{segment.path}, line {number + 1}: {error}"), skipped, error)
        yield records


def _read_object(text: bytes) -> dict[str, Any]:
    """Read one object. Python's parser reads what orjson refuses, NaN for example, and says what is wrong."""
    try:
        row = parse_json(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 ({bad_byte(error)}); convert the file first") from error
    except ValueError as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else error
        raise ValueError(f"not valid JSON ({reason}): {text[:60].decode('utf-8', 'replace')!r}") from error
    if type(row) is not dict:
        raise ValueError(f"{type(row).__name__}; expected an object")
    return row


def _read_json(segment: Segment, skipped: Skipped | None, read_bytes: int) -> Iterator[Records]:
    if files.holds_lines(segment.path):
        yield from _read_json_lines(segment, skipped, read_bytes)
        return
    first = 0
    with open_file(segment.path) as file:
        for values in elements(file, segment.path, read_bytes):
            records = Records([], [])
            for number, value in enumerate(values, first):
                if isinstance(value, dict):
                    records.rows.append(value)
                    records.numbers.append(number)
                else:
                    found = f"{segment.path}, element {number}: {type(value).__name__}"
                    _report(FileFormatError(f"{found}; expected an object"), skipped)
            first += len(values)
            yield records


# -- text and Parquet ------------------------------------------------------------------------------------------------


def _read_text(segment: Segment, skipped: Skipped | None, read_bytes: int) -> Iterator[Records]:
    separator = DOCUMENTS[segment.documents]
    for line, chunk in _read_chunks(segment, separator, read_bytes):
        try:
            text = chunk.decode("utf-8")
        except UnicodeDecodeError as error:
            number = line + chunk.count(b"\n", 0, error.start) + 1
            reason = f"{segment.path}, line {number}: not UTF-8 ({bad_byte(error)}); convert the file first"
            _report(FileFormatError(reason), skipped, error)
            text = chunk.decode("utf-8", "replace")
            if skipped is not None:
                skipped.count += text.count("\ufffd") - chunk.count(b"\xef\xbf\xbd") - 1
        if "\r" in text:
            text = text.replace("\r\n", "\n")
        records = Records([], [])
        for document in [text] if separator is None else text.split(separator.decode()):
            stripped = document.strip("\n")
            if stripped and not stripped.isspace():
                records.rows.append({"text": stripped})
                records.numbers.append(line + len(document) - len(document.lstrip("\n")))
            line += document.count("\n") + (0 if separator is None else len(separator))
        yield records


def _read_parquet(segment: Segment, skipped: Skipped | None, read_bytes: int) -> Iterator[Records]:
    for row, batch in parquet_batches(segment):
        with parquet_errors(segment.path):
            records = Records(batch.to_pylist(), list(range(row, row + len(batch))))
        yield records


def parquet_batches(segment: Segment) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Yield the rows of a Parquet file in batches, each with the number of its first row.

    Raises:
        FileFormatError: the file is damaged, or is none.
    """
    with parquet_errors(segment.path), pq.ParquetFile(segment.path) as file:
        firsts = [0]
        for i in range(file.metadata.num_row_groups):
            firsts.append(firsts[-1] + file.metadata.row_group(i).num_rows)
        end = firsts[-1] if segment.end is None else segment.end
        groups = [i for i, first in enumerate(firsts[:-1]) if segment.begin <= first < end]
        row = segment.begin
        for batch in file.iter_batches(2_000, row_groups=groups):
            yield row, batch
            row += len(batch)


@contextlib.contextmanager
def parquet_errors(path: str) -> Iterator[None]:
    """Name the file in an error of what reads Parquet."""
    try:
        yield
    except (OSError, ValueError, pa.ArrowException, MemoryError, OverflowError) as error:
        raise FileFormatError(f"{path} is not a Parquet file, or is damaged ({error})") from error


#: How the records of a file are read, by its ending.
READERS: dict[str, Callable[[Segment, Skipped | None, int], Iterator[Records]]] = {
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}
