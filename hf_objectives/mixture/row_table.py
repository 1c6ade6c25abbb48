"""Rows of a mapped dataset by number, many at a time, without a formatter in between."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset
from numpy.typing import NDArray

from hf_objectives.errors import ConfigError, DataError

Row = dict[str, Any]
Integers = NDArray[np.int64]
Counted = Callable[[NDArray], NDArray[np.bool_]]
INTEGERS = "lists of integers"  # the type of a column of these, whatever their width


def gathered(groups: Integers, read: Callable[[int, Integers], Sequence[Any]]) -> list[Any]:
    """Values in the order of their groups, where `read(group, places)` gives those of one group."""
    found: list[Any] = [None] * len(groups)
    order = np.argsort(groups, kind="stable")
    for places in np.split(order, np.flatnonzero(np.diff(groups[order])) + 1) if len(groups) else ():
        for place, value in zip(places.tolist(), read(int(groups[places[0]]), places), strict=True):
            found[place] = value
    return found


class RowTable:
    """A table, or a `datasets.Dataset`, as the mixture reads it. The format of a dataset is ignored, except for its columns.

    Lists of integers come as views of the table (integer arrays [tokens], not writable), numbers and strings as Python
    values. A dataset with nested columns, or with features that are decoded, is read through `datasets`. One with a transform
    is refused.
    """

    def __init__(self, rows: Dataset | pa.Table) -> None:
        self._rows = rows
        self._dataset: Dataset | None = None
        self._indices: NDArray | None = None
        table: pa.Table = rows
        self.names: list[str] = rows.column_names
        if isinstance(rows, Dataset):
            if rows.format["type"] == "custom":
                raise ConfigError("the dataset has a transform (set_transform), which is not applied here; use map")
            table, self.names = rows.data.table, list(rows.format["columns"])
            if rows._indices is not None:  # the rows that select, filter and shuffle left
                self._indices = rows._indices.column(0).to_numpy()
            decoded = rows.features._column_requires_decoding
            if not all(is_direct(table[name].type) and not decoded[name] for name in self.names):
                self._dataset = rows.with_format(None, columns=self.names)
        # Columns may be cut in different places (add_column); batches are cut where any is.
        self._table = table.select(self.names)
        self._batches = self._table.to_batches()
        self._begins = np.cumsum([0, *(batch.num_rows for batch in self._batches)])
        self._readers: dict[int, list[Callable[[Integers], list[Any]]]] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def check_columns(self, names: Collection[str], source: str, first: int = 0) -> None:
        """Raise a DataError if a row of the source, of which the first has this number, has other columns than these."""
        _check_columns(self.names, names, source, first)

    def types(self) -> dict[str, str]:
        """The type of each column."""
        return {field.name: INTEGERS if _is_list(field.type) else str(field.type) for field in self._table.schema}

    def lengths(self, name: str) -> Integers:
        """Lengths of the lists of a column, int64 [rows]; no values are read."""
        return self._per_row(name, lambda lists: np.diff(lists.offsets.to_numpy()))

    def counts(self, name: str, counted: Counted) -> Integers:
        """How many values of each list `counted` is true for, int64 [rows]."""

        def count(lists: Any) -> NDArray:
            ends = np.concatenate(([0], np.cumsum(counted(lists.flatten().to_numpy()))))
            offsets = lists.offsets.to_numpy().astype(np.int64)
            return np.diff(ends[offsets - offsets[0]])

        return self._per_row(name, count)

    def _per_row(self, name: str, measure: Callable[[Any], NDArray]) -> Integers:
        parts = [measure(chunk) for chunk in self._table[name].chunks]
        values = np.concatenate([np.zeros(0, np.int64), *parts]).astype(np.int64)
        return values if self._indices is None else values[self._indices]

    def column(self, name: str) -> pa.ChunkedArray:
        """A column, in the order of the rows."""
        column = self._table[name]
        return column if self._indices is None else column.take(pa.array(self._indices))

    def read(self, rows: Integers) -> list[Row]:
        """Rows by their numbers."""
        if self._dataset is not None:
            return self._dataset.__getitems__(rows.tolist())
        places = rows if self._indices is None else self._indices[rows].astype(np.int64)
        if len(self._batches) == 1:
            return self._read_batch(0, places)
        batches = np.searchsorted(self._begins, places, "right") - 1
        return gathered(batches, lambda batch, chosen: self._read_batch(batch, places[chosen] - self._begins[batch]))

    def _read_batch(self, number: int, rows: Integers) -> list[Row]:
        if number not in self._readers:
            self._readers[number] = list(map(_reader, self._batches[number].columns))
        columns = [read(rows) for read in self._readers[number]]
        return [dict(zip(self.names, values, strict=True)) for values in zip(*columns, strict=True)]

    def __reduce__(self) -> Any:
        # A dataset goes to another process by the files that it maps; the views of it would go by value.
        return RowTable, (self._rows,)


class RowList:
    """Rows that are Python mappings already, with the methods of `RowTable`."""

    def __init__(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self._rows = rows
        self.names = list(rows[0]) if len(rows) else []

    def __len__(self) -> int:
        return len(self._rows)

    def check_columns(self, names: Collection[str], source: str, first: int = 0) -> None:
        """See `RowTable`."""
        for number, row in enumerate(self._rows, first):
            _check_columns(row, names, source, number)

    def types(self) -> dict[str, str]:
        """See `RowTable`; types that Python values do not tell are empty."""
        kinds = {str: "string", int: "int64", float: "double", bool: "bool"}
        return {name: kinds.get(type(value), "") for name, value in self._rows[0].items()}

    def lengths(self, name: str) -> Integers:
        """See `RowTable`."""
        return np.array([len(row[name]) for row in self._rows], np.int64)

    def counts(self, name: str, counted: Counted) -> Integers:
        """See `RowTable`."""
        return np.array([int(counted(np.asarray(row[name])).sum()) for row in self._rows], np.int64)

    def column(self, name: str) -> pa.ChunkedArray:
        """See `RowTable`."""
        return pa.chunked_array([pa.array([row[name] for row in self._rows])])

    def read(self, rows: Integers) -> list[Row]:
        """See `RowTable`."""
        return [dict(self._rows[i]) for i in rows.tolist()]


def _check_columns(found: Iterable[str], names: Collection[str], source: str, row: int) -> None:
    if set(found) != set(names):
        expected = f"expected {', '.join(names)}, as in the first row"
        raise DataError(f"columns {', '.join(found)}; {expected}", source=source, row=row)


def _is_list(kind: pa.DataType) -> bool:
    return (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and pa.types.is_integer(kind.value_type)


def is_direct(kind: pa.DataType) -> bool:
    """Whether a column's values are lists of integers, or neither lists nor mappings."""
    return _is_list(kind) or not pa.types.is_nested(kind)


def _reader(chunk: pa.Array) -> Callable[[Integers], list[Any]]:
    if not _is_list(chunk.type) or chunk.null_count:
        return lambda rows: chunk.take(pa.array(rows)).to_pylist()
    offsets = chunk.offsets.to_numpy().astype(np.int64)
    values = chunk.values.to_numpy(zero_copy_only=False)
    return lambda rows: [values[a:b] for a, b in zip(offsets[rows].tolist(), offsets[rows + 1].tolist(), strict=True)]
