"""Rows on disk, read a batch at a time, so that memory does not grow with their number."""

from __future__ import annotations

import itertools
import json
import mmap
import tempfile
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload
from uuid import uuid4

import numpy as np
import orjson
import pyarrow as pa
from datasets import Dataset, config
from datasets.fingerprint import Hasher
from numpy.typing import ArrayLike, NDArray

from hf_objectives.errors import FileFormatError
from hf_objectives.preparation.files import kind_of, whole_file
from hf_objectives.preparation.places import Place, local_files
from hf_objectives.preparation.readers import parquet_batches, parquet_errors, read_segment
from hf_objectives.preparation.shards import disk_full
from hf_objectives.preparation.splits import ROWS_READ, rows_at
from hf_objectives.types import TOO_DEEP, Row

_READ_BYTES = 1 << 20  # of a file at a time: as Python values they are twenty times as much
_JSON = "json"  # the column of rows that are kept as text
#: How the text of each row is parsed, or None where the table has the rows' columns; and the table.
Part = tuple[Callable[[bytes], Row] | None, pa.Table]


class LazyRows(Sequence[Row]):
    """A sequence of rows that are made as they are asked for, at best many at a time."""

    @abstractmethod
    def take(self, numbers: ArrayLike) -> list[Row]:
        """The rows of these numbers, int64 [rows]."""

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return self.take(np.arange(*index.indices(len(self))))
        return self.take([range(len(self))[index]])[0]

    def __iter__(self) -> Iterator[Row]:
        for begin in range(0, len(self), ROWS_READ):
            yield from self[begin : begin + ROWS_READ]


class StoredRows(LazyRows):
    """The rows of local files in memory-mapped Arrow tables.

    A JSON row is stored as text, because columns would give every row the keys of all rows. Parquet rows keep their columns.
    """

    def __init__(self, parts: Sequence[Part], place: Place, columns: Sequence[str]) -> None:
        self._parts = parts
        self._begins = np.cumsum([0, *(table.num_rows for _, table in parts)])
        self._path = place.path
        self._renaming = place.renaming(columns)

    def __len__(self) -> int:
        return int(self._begins[-1])

    def take(self, numbers: ArrayLike) -> list[Row]:
        """The rows of these numbers, int64 [rows]."""
        found: list[Row] = []
        for part, chosen in _by_part(self._begins, np.asarray(numbers, np.int64)):
            parse, table = self._parts[part]
            if parse is not None:
                found += map(parse, _taken(table, chosen)[_JSON].to_pylist())
                continue
            with parquet_errors(self._path):
                found += _taken(table, chosen).to_pylist()
        return found if self._renaming is None else [self._renaming.of_row(row) for row in found]


class SelectedRows(LazyRows):
    """Some rows of a source, each with the `source` and with its number there in `row`."""

    def __init__(self, rows: Dataset | Sequence[Row], numbers: NDArray[np.int64], source: str) -> None:
        self._rows, self._numbers, self._source = rows, numbers, source

    def __len__(self) -> int:
        return len(self._numbers)

    def first(self, count: int) -> SelectedRows:
        """The first of them."""
        return SelectedRows(self._rows, self._numbers[:count], self._source)

    def take(self, numbers: ArrayLike) -> list[Row]:
        """The rows of these numbers among those that were selected, int64 [rows]."""
        chosen = self._numbers[np.asarray(numbers, np.int64)]
        rows = rows_at(self._rows, chosen)
        return [{**row, "source": self._source, "row": i} for row, i in zip(rows, chosen.tolist(), strict=True)]


class ChainedRows(LazyRows):
    """The rows of several sequences, one after the other."""

    def __init__(self, parts: Sequence[Sequence[Row]]) -> None:
        self._parts = parts
        self._begins = np.cumsum([0, *map(len, parts)])

    def __len__(self) -> int:
        return int(self._begins[-1])

    def take(self, numbers: ArrayLike) -> list[Row]:
        """The rows of these numbers, int64 [rows]."""
        parts = _by_part(self._begins, np.asarray(numbers, np.int64))
        return [row for part, chosen in parts for row in rows_at(self._parts[part], chosen)]


def store_rows(place: Place) -> StoredRows | Dataset:
    """Read the rows of a place once: a dataset of the Hub, a stream of one, or local files.

    Local files and streams are copied to an unlinked temporary file in the cache folder of `datasets`. The operating system
    removes it when the process ends.

    Raises:
        FileFormatError, ConfigError: see `load_rows`.
        DiskFullError: the cache folder has no room.
    """
    if place.on_hub and not place.streaming:
        return place.rename(place.load_dataset())
    if place.on_hub:
        with place.naming():
            tables = mapped_tables(place.load_dataset().with_format("arrow").iter(ROWS_READ))
        if not tables:
            raise FileFormatError(f"{place.path} holds no rows")
        return place.rename(mapped_dataset(pa.concat_tables(tables, promote_options="default")))
    columns: dict[str, None] = {}
    parts: list[Part] = []
    for parse, group in itertools.groupby(_files(place.path, columns), key=lambda part: part[0]):
        parts += ((parse, table) for table in mapped_tables(table for _, table in group))
    if not parts:
        raise FileFormatError(f"{place.path} holds no rows")
    return StoredRows(parts, place, list(columns))


def _files(name: str, columns: dict[str, None]) -> Iterator[Part]:
    for file in local_files(name):
        segment = whole_file("", file)
        if kind_of(file) == ".parquet":
            for _, batch in parquet_batches(segment):
                columns.update(dict.fromkeys(batch.schema.names))
                if len(batch):
                    yield None, pa.table(batch)
            continue
        for records in read_segment(segment, read_bytes=_READ_BYTES):
            if not records.rows:
                continue
            for keys in dict.fromkeys(map(tuple, records.rows)):
                columns.update(dict.fromkeys(keys))
            # The two parsers differ, in long integers for example: each text is parsed again by the one that read it.
            parse: Callable[[bytes], Row] = orjson.loads if records.texts else json.loads
            try:
                texts = records.texts or [json.dumps(row).encode() for row in records.rows]
            except RecursionError as error:
                raise FileFormatError(f"{file}: {TOO_DEEP}") from error
            yield parse, pa.table({_JSON: pa.array(texts, pa.large_binary())})


def mapped_tables(tables: Iterable[pa.Table]) -> list[pa.Table]:
    """Copy tables to unlinked temporary files and memory-map them; consecutive tables of one schema become one.

    The files are in the cache folder of `datasets`. If that is read-only, they are in the system's temporary folder.

    Raises:
        DiskFullError: there is no room.
    """
    return [_mapped(schema, group) for schema, group in itertools.groupby(tables, key=lambda table: table.schema)]


def _mapped(schema: pa.Schema, tables: Iterable[pa.Table]) -> pa.Table:
    folder = Path(config.HF_DATASETS_CACHE)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (the mapping outlives it)
    except OSError:
        folder, file = Path(tempfile.gettempdir()), tempfile.TemporaryFile()  # noqa: SIM115
    with file:
        try:
            write_tables(file, schema, tables)
            file.flush()
        except OSError as error:
            raise disk_full(error, folder / "rows") from error
        return pa.ipc.open_stream(pa.py_buffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))).read_all()


def write_tables(sink: Any, schema: pa.Schema, tables: Iterable[pa.Table]) -> None:
    """Write tables to a path or an open file as an Arrow IPC stream, the format that `datasets` memory-maps."""
    with pa.ipc.new_stream(sink, schema) as writer:
        for table in tables:
            writer.write_table(table)


def mapped_dataset(table: pa.Table) -> Dataset:
    """A memory-mapped table as a dataset. It gets a random fingerprint: `datasets` would read the whole table to make one."""
    return Dataset(table, fingerprint=Hasher.hash(uuid4()))


def _taken(table: pa.Table, numbers: NDArray[np.int64]) -> pa.Table:
    # What is taken is copied: from a slice it is little, whatever the order of the numbers.
    begin, end = int(numbers.min()), int(numbers.max()) + 1
    part = table.slice(begin, end - begin)
    return part if (np.diff(numbers) == 1).all() else part.take(pa.array(numbers - begin))


def _by_part(begins: NDArray[np.int64], numbers: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Row numbers as those of the parts that lie end to end, in the order that is asked for."""
    parts = np.searchsorted(begins, numbers, "right") - 1
    for chosen in np.split(np.arange(len(numbers)), np.flatnonzero(np.diff(parts)) + 1) if len(numbers) else ():
        part = int(parts[chosen[0]])
        yield part, numbers[chosen] - begins[part]
