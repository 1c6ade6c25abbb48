"""Rows that lie on disk and are read a batch at a time, so that their number costs no memory."""

from __future__ import annotations

import itertools
import json
import tempfile
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import overload
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
from hf_objectives.types import TOO_DEEP, Row, parse_json

_READ_BYTES = 1 << 20  # of a file at a time: as Python values they are twenty times as much
_JSON = "hf_objectives.json"  # the column of rows that are kept as text


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
    """The rows of local files, as Arrow tables that are mapped into memory from a file without a name.

    A row of JSON is kept as its text: a table would give each row the keys of all. Rows of Parquet keep their columns.
    """

    def __init__(self, tables: Sequence[pa.Table], place: Place, columns: Sequence[str]) -> None:
        self._tables = tables
        self._begins = np.cumsum([0, *(table.num_rows for table in tables)])
        self._path = place.path
        self._renaming = place.renaming(columns)

    def __len__(self) -> int:
        return int(self._begins[-1])

    def take(self, numbers: ArrayLike) -> list[Row]:
        """The rows of these numbers, int64 [rows]."""
        parts = _by_part(self._begins, np.asarray(numbers, np.int64))
        with parquet_errors(self._path):
            found = [row for table, chosen in parts for row in _read(self._tables[table], chosen)]
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
    """The rows of a place: a dataset of the Hub, or local files or a stream of the Hub, read once and kept on disk.

    The copy lies in the cache folder of `datasets`. It has no name there, so it is gone with the process.

    Raises:
        FileFormatError, ConfigError: see `load_rows`.
        DiskFullError: the cache folder has no room.
    """
    if place.on_hub and not place.streaming:
        return place.rename(place.load_dataset())
    columns: dict[str, None] = {}
    batches = place.load_dataset().with_format("arrow").iter(ROWS_READ) if place.on_hub else _files(place.path, columns)
    tables = [mapped_table(group) for _, group in itertools.groupby(batches, key=lambda batch: batch.schema)]
    if not any(table.num_rows for table in tables):
        raise FileFormatError(f"{place.path} holds no rows")
    if place.on_hub:
        return place.rename(mapped_dataset(pa.concat_tables(tables, promote_options="default")))
    return StoredRows(tables, place, list(columns))


def _files(name: str, columns: dict[str, None]) -> Iterator[pa.Table]:
    for file in local_files(name):
        segment = whole_file("", file)
        if kind_of(file) == ".parquet":
            for _, batch in parquet_batches(segment):
                columns.update(dict.fromkeys(batch.schema.names))
                yield pa.table(batch)
            continue
        for records in read_segment(segment, read_bytes=_READ_BYTES):
            for keys in dict.fromkeys(map(tuple, records.rows)):
                columns.update(dict.fromkeys(keys))
            try:
                texts = records.texts or [json.dumps(row).encode() for row in records.rows]
            except RecursionError as error:
                raise FileFormatError(f"{file}: {TOO_DEEP}") from error
            yield pa.table({_JSON: pa.array(texts, pa.large_binary())})


def mapped_table(tables: Iterable[pa.Table]) -> pa.Table:
    """Tables of one schema, one at least, as one that is mapped into memory, from a file of the cache whose name is gone.

    Raises:
        DiskFullError: the cache folder of `datasets` has no room.
    """
    rest = iter(tables)
    first = next(rest)
    folder = Path(config.HF_DATASETS_CACHE)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, prefix="rows-", suffix=".arrow") as file:
        path = Path(file.name)
        try:
            with pa.ipc.new_file(str(path), first.schema) as writer:
                for table in itertools.chain([first], rest):
                    writer.write_table(table)
        except OSError as error:
            raise disk_full(error, path) from error
        return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def mapped_dataset(table: pa.Table) -> Dataset:
    """A mapped table as a dataset. Without a fingerprint of ours, `datasets` would read all of it for one."""
    return Dataset(table, fingerprint=Hasher.hash(uuid4()))


def _read(table: pa.Table, numbers: NDArray[np.int64]) -> list[Row]:
    # What is taken is copied: from a slice it is little, whatever the order of the numbers.
    begin, end = int(numbers.min()), int(numbers.max()) + 1
    part = table.slice(begin, end - begin)
    if end - begin != len(numbers) or (np.diff(numbers) != 1).any():
        part = part.take(pa.array(numbers - begin))
    return list(map(_parsed, part[_JSON].to_pylist())) if part.column_names == [_JSON] else part.to_pylist()


def _parsed(text: bytes) -> Row:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:  # NaN, say
        return parse_json(text.decode("utf-8"))


def _by_part(begins: NDArray[np.int64], numbers: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Row numbers as those of the parts that lie end to end, in the order that is asked for."""
    parts = np.searchsorted(begins, numbers, "right") - 1
    for chosen in np.split(np.arange(len(numbers)), np.flatnonzero(np.diff(parts)) + 1) if len(numbers) else ():
        part = int(parts[chosen[0]])
        yield part, numbers[chosen] - begins[part]
