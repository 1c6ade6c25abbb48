"""Files as records: which files a name stands for, how each is cut into segments, and the records of a segment.

A record is one row: a line of JSON, an element of a JSON array, a row of a Parquet file, a document of a text file. Plain
files are cut where a record begins, so that several workers read one file; compressed files and JSON arrays are one
segment, read as a stream.
"""

from __future__ import annotations

import contextlib
import glob
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from hf_objectives.errors import ConfigError, FileFormatError, nearest
from hf_objectives.preparation.json_array import bad_byte, elements

COMPRESSIONS = (".gz", ".zst")
#: How a text file falls into documents, by name: what ends one.
DOCUMENTS = {"blank_line": b"\n\n", "line": b"\n", "file": None}
READ_BYTES = (
    8 << 20
)  # text read, encoded and packed at a time: large enough to pack well, small enough to stay in cache
_SKIPPED_NAMED = 5


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of records of one file, the unit of work.

    Attributes:
        source: name of the source.
        path: the file.
        begin, end: bytes of a plain file, rows of a Parquet file; end None for "to the end of the stream".
        first: number of the first record: its line for line and text formats, else its index, from 0.
        size, mtime_ns: the file's, when it was listed; another file of that name is not read by mistake.
        documents: how a text file falls into documents, a key of DOCUMENTS.
    """

    source: str
    path: str
    begin: int
    end: int | None
    first: int
    size: int
    mtime_ns: int
    documents: str = "blank_line"

    def place(self, number: int | None) -> str:
        """The file, and the line of a record by its number, from 1 as editors count, where records have lines."""
        if number is None or kind_of(self.path) not in (".jsonl", ".ndjson", ".txt"):
            return self.path
        return f"{self.path}, line {number + 1}"


@dataclass(frozen=True, slots=True)
class Records:
    """Some records: the rows, and the number of each (see Segment.first)."""

    rows: list[dict[str, Any]]
    numbers: list[int]


@dataclass(slots=True)
class Skipped:
    """Broken records that were left out: how many, and the first few in words."""

    count: int = 0
    named: list[str] = field(default_factory=list)

    def add(self, error: Exception) -> None:
        """Book one."""
        self.count += 1
        if len(self.named) < _SKIPPED_NAMED:
            self.named.append(str(error))


def kind_of(path: str | Path) -> str | None:
    """The ending that says what is in a file, a key of KINDS, its compression left aside; None for another file."""
    suffixes = Path(path).suffixes
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes = suffixes[:-1]
    kind = suffixes[-1] if suffixes else None
    return kind if kind in KINDS else None


def list_files(pattern: str) -> list[str]:
    """The files that a path, a folder or a glob stands for, in order of name.

    Raises:
        FileFormatError: there is none.
        ConfigError: a file whose ending is not known.
    """
    path = Path(pattern)
    if path.is_dir():
        found = sorted(str(p) for p in path.rglob("*") if p.is_file() and kind_of(p))
    elif path.exists():
        found = [pattern]
    else:
        matched = glob.glob(pattern, recursive=True)  # noqa: PTH207 (a pattern may be absolute)
        found = sorted(p for p in matched if Path(p).is_file())
    if not found:
        raise FileFormatError(f"no such file: {pattern}" if not path.is_dir() else f"no data files in {pattern}")
    for file in found:
        if kind_of(file) is None:
            raise ConfigError(
                f"{file} ends in {Path(file).suffix or 'nothing'}; expected one of {', '.join(KINDS)}, "
                f"plain or with {' or '.join(COMPRESSIONS)}"
            )
    return found


def plan_file(source: str, path: str, *, segment_bytes: int, documents: str = "blank_line") -> list[Segment]:
    """Cut a file into segments of about `segment_bytes`, each beginning where a record begins.

    The cut depends on the file and on `segment_bytes` alone, so that rows do not depend on who prepares them.

    Raises:
        FileFormatError: the file is missing, or is not what its name says.
        ConfigError: unknown `documents`.
    """
    whole = whole_file(source, path, documents)
    kind = kind_of(path)
    assert kind is not None  # list_files checked
    if kind == ".parquet":
        return _plan_parquet(whole, segment_bytes)
    separator = {".txt": DOCUMENTS[documents]}.get(kind, b"\n")
    if Path(path).suffix in COMPRESSIONS or separator is None or (kind == ".json" and not _holds_lines(path)):
        return [whole]
    return _plan_plain(whole, segment_bytes, separator)


def whole_file(source: str, path: str, documents: str = "blank_line") -> Segment:
    """A file as one segment, to its end.

    Raises:
        FileFormatError: the file is missing.
        ConfigError: unknown `documents`.
    """
    if documents not in DOCUMENTS:
        raise ConfigError(
            f"documents is {documents!r}; expected one of {', '.join(DOCUMENTS)}{nearest(str(documents), DOCUMENTS)}"
        )
    try:
        stat = Path(path).stat()
    except OSError as error:
        raise FileFormatError(f"no such file: {path}") from error
    return Segment(source, path, 0, None, 0, stat.st_size, stat.st_mtime_ns, documents)


def read_segment(segment: Segment, *, skipped: Skipped | None = None) -> Iterator[Records]:
    """The records of a segment, some megabytes at a time.

    Args:
        segment: from `plan_file`.
        skipped: is given the records that cannot be read, which are then left out; None makes the first an error.

    Raises:
        FileFormatError: the file vanished, changed, ends too soon, or a record is broken; names file and line.
    """
    try:
        stat = Path(segment.path).stat()
        if (stat.st_size, stat.st_mtime_ns) != (segment.size, segment.mtime_ns):
            raise FileFormatError(f"{segment.path} changed while it was prepared; run again when it is complete")
        yield from KINDS[kind_of(segment.path) or ""](segment, skipped)
    except FileNotFoundError as error:
        _report(FileFormatError(f"{segment.path} vanished while it was prepared"), skipped, error)
    except FileFormatError as error:
        _report(error, skipped, error.__cause__)


def load_rows(name: str, *, documents: str = "blank_line") -> list[dict[str, Any]]:
    """All rows of local files in memory; see `list_files` for what a name may be.

    Raises:
        FileFormatError: a file that is missing, empty or not what its name says; names file and line.
        ConfigError: a file whose ending is not known.
    """
    rows = []
    for file in list_files(name):
        for records in read_segment(whole_file("", file, documents)):
            rows += records.rows
    if not rows:
        raise FileFormatError(f"{name} holds no rows")
    return rows


def _report(error: FileFormatError, skipped: Skipped | None, cause: BaseException | None) -> None:
    if skipped is None:
        raise error from cause
    skipped.add(error)


# -- lines -----------------------------------------------------------------------------------------------------------


def _open(path: str) -> IO[bytes]:
    # pyarrow decompresses by the ending, several members or frames too, and tells a stream that ends too soon.
    return io.BufferedReader(pa.input_stream(path), 1 << 20)


def _plan_plain(whole: Segment, segment_bytes: int, separator: bytes) -> list[Segment]:
    segments, at, line, begin, first = [], 0, 0, 0, 0
    with Path(whole.path).open("rb") as file:
        while chunk := file.read(min(READ_BYTES, segment_bytes - (at - begin))):
            at, line = at + len(chunk), line + _line_ends(chunk)
            if at - begin < segment_bytes:
                continue
            rest = _to_separator(file, chunk, separator)
            at, line = at + len(rest), line + rest.count(b"\n")
            segments.append(_part(whole, begin, at, first))
            begin, first = at, line
    return [*segments, _part(whole, begin, at, first)] if at > begin else segments


def _line_ends(chunk: bytes) -> int:
    # Five times as fast as bytes.count.
    return int(np.count_nonzero(np.frombuffer(chunk, np.uint8) == ord("\n")))


def _part(whole: Segment, begin: int, end: int, first: int) -> Segment:
    return Segment(whole.source, whole.path, begin, end, first, whole.size, whole.mtime_ns, whole.documents)


def _to_separator(file: IO[bytes], chunk: bytes, separator: bytes) -> bytes:
    """What is left of the record that a chunk ends in."""
    rest: list[bytes] = []
    last = chunk
    while not last.endswith(separator):
        line = file.readline()
        if not line:
            break
        rest.append(line)
        # Line ends of any kind count, and a separator may begin in the line before.
        last = (last[-2:] + line).replace(b"\r\n", b"\n")
    return b"".join(rest)


def _chunks(segment: Segment, separator: bytes | None) -> Iterator[tuple[int, bytes]]:
    """Whole records, some megabytes at a time: the line of the first, and the bytes."""
    line = segment.first
    with _open(segment.path) as file:
        if segment.begin:
            file.seek(segment.begin)
        left = None if segment.end is None else segment.end - segment.begin
        while left is None or left > 0:
            size = READ_BYTES if left is None else min(READ_BYTES, left)
            try:
                chunk = file.read() if separator is None else file.read(size)
                if separator is not None and (left is None or size < left):
                    chunk += _to_separator(file, chunk, separator)
            except OSError as error:
                raise FileFormatError(
                    f"{segment.path}: the compressed file is damaged or ends too soon, after line {line} ({error})"
                ) from error
            if not chunk:
                if left:
                    raise FileFormatError(f"{segment.path} ends {left} bytes too soon, after line {line}")
                return
            yield line, chunk
            line += _line_ends(chunk)
            left = None if left is None else left - len(chunk)


def _json_lines(segment: Segment, skipped: Skipped | None) -> Iterator[Records]:
    for line, chunk in _chunks(segment, b"\n"):
        texts = chunk.split(b"\n")
        if not texts[-1]:
            texts.pop()
        try:  # nearly always: one object a line, at the speed of the parser
            rows = list(map(orjson.loads, texts))
        except orjson.JSONDecodeError:
            rows = []
        if set(map(type, rows)) == {dict}:
            yield Records(rows, list(range(line, line + len(rows))))
            continue
        rows, numbers = [], []
        for number, text in enumerate(texts, line):
            if not text or text.isspace():
                continue
            try:
                row = orjson.loads(text)
            except orjson.JSONDecodeError:
                row = _broken_line(segment.path, number, text, skipped)
            if type(row) is dict:
                rows.append(row)
                numbers.append(number)
            elif row is not _BROKEN:
                reason = f"{segment.path}, line {number + 1}: {type(row).__name__}; expected an object"
                _report(FileFormatError(reason), skipped, None)
        yield Records(rows, numbers)


_BROKEN = object()


def _broken_line(path: str, number: int, text: bytes, skipped: Skipped | None) -> Any:
    """What Python reads in a line that orjson refuses (NaN, say), or the report of what is wrong with it."""
    try:
        return json.loads(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        reason = f"{path}, line {number + 1}: not UTF-8 ({bad_byte(error)}); convert the file first"
        _report(FileFormatError(reason), skipped, error)
    except json.JSONDecodeError as error:
        reason = f"{path}, line {number + 1}: not valid JSON ({error.msg}): {text[:60].decode('utf-8', 'replace')!r}"
        _report(FileFormatError(reason), skipped, error)
    return _BROKEN


# -- JSON arrays -----------------------------------------------------------------------------------------------------


def _holds_lines(path: str) -> bool:
    """Whether a file under the name of JSON holds JSON lines: it begins with an object that ends on its line."""
    with _open(path) as file, contextlib.suppress(OSError):
        first = file.readline()
        while first and first.isspace():
            first = file.readline()
        if first.lstrip().startswith(b"{"):
            try:
                orjson.loads(first)
            except orjson.JSONDecodeError:
                return False
            return bool(file.readline().strip())
    return False


def _json(segment: Segment, skipped: Skipped | None) -> Iterator[Records]:
    if _holds_lines(segment.path):
        yield from _json_lines(segment, skipped)
        return
    first = 0
    for values in _elements(segment.path):
        rows, numbers = [], []
        for n, value in enumerate(values, first):
            if isinstance(value, dict):
                rows.append(value)
                numbers.append(n)
                continue
            reason = f"{segment.path}, element {n}: {type(value).__name__}; expected an object"
            _report(FileFormatError(reason), skipped, None)
        first += len(values)
        yield Records(rows, numbers)


def _elements(path: str) -> Iterator[list[Any]]:
    with _open(path) as file:
        yield from elements(file, path, READ_BYTES)


# -- text ------------------------------------------------------------------------------------------------------------


def _text(segment: Segment, skipped: Skipped | None) -> Iterator[Records]:
    separator = DOCUMENTS[segment.documents]
    for line, chunk in _chunks(segment, separator):
        try:
            text = chunk.decode("utf-8")
        except UnicodeDecodeError as error:
            at = line + chunk.count(b"\n", 0, error.start) + 1
            reason = f"{segment.path}, line {at}: not UTF-8 ({bad_byte(error)}); convert the file first"
            _report(FileFormatError(reason), skipped, error)
            text = chunk.decode("utf-8", "replace")
            if skipped is not None:
                skipped.count += text.count("\ufffd") - chunk.count(b"\xef\xbf\xbd") - 1
        if "\r" in text:
            text = text.replace("\r\n", "\n")
        documents = [text] if separator is None else text.split(separator.decode())
        rows, numbers = [], []
        for document in documents:
            stripped = document.strip("\n")
            if stripped and not stripped.isspace():
                rows.append({"text": stripped})
                numbers.append(line + len(document) - len(document.lstrip("\n")))
            line += document.count("\n") + (0 if separator is None else len(separator))
        yield Records(rows, numbers)


# -- Parquet ---------------------------------------------------------------------------------------------------------


def _plan_parquet(whole: Segment, segment_bytes: int) -> list[Segment]:
    try:
        with pq.ParquetFile(whole.path) as file:
            groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
            sizes = [(group.num_rows, group.total_byte_size) for group in groups]
    except (OSError, ValueError) as error:
        raise FileFormatError(f"{whole.path} is not a Parquet file, or is damaged ({error})") from error
    segments, begin, row, held = [], 0, 0, 0
    for rows, size in sizes:
        if held and held + size > segment_bytes:
            segments.append(_part(whole, begin, row, begin))
            begin, held = row, 0
        row, held = row + rows, held + size
    return [*segments, _part(whole, begin, row, begin)] if row > begin else segments


def _parquet(segment: Segment, skipped: Skipped | None) -> Iterator[Records]:
    try:
        with pq.ParquetFile(segment.path) as file:
            firsts = [0]
            for i in range(file.metadata.num_row_groups):
                firsts.append(firsts[-1] + file.metadata.row_group(i).num_rows)
            end = firsts[-1] if segment.end is None else segment.end
            groups = [i for i, first in enumerate(firsts[:-1]) if segment.begin <= first < end]
            row = segment.begin
            for batch in file.iter_batches(2_000, row_groups=groups):
                yield Records(batch.to_pylist(), list(range(row, row + len(batch))))
                row += len(batch)
    except (OSError, ValueError) as error:
        raise FileFormatError(f"{segment.path} is not a Parquet file, or is damaged ({error})") from error


#: How the records of a file are read, by its ending.
KINDS: dict[str, Callable[[Segment, Skipped | None], Iterator[Records]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".parquet": _parquet,
    ".txt": _text,
}
