"""A prepared folder as a stream without an end: read where it lies, shuffled anew in every pass, at any row at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from hf_objectives.errors import PreparedDataError
from hf_objectives.preparation.ordered_stream import OrderedStream
from hf_objectives.preparation.shards import Shard

# The values of a list column end to end, and where each row begins in them.
Column = tuple[Any, NDArray[np.int64]]
WINDOW = 8  # row groups of some two million tokens


@dataclass(frozen=True, slots=True)
class Place:
    """Where a row of the order lies: the pass, the shard's number, the row group in it, the row in that."""

    epoch: int
    shard: int
    group: int
    row: int


class PreparedStream(OrderedStream):
    """The packed rows of shards, pass after pass.

    In every pass the row groups of all shards are permuted, and the rows of each `window` consecutive groups among
    themselves, from seed and pass alone: row n is the same whoever asks, and is found without reading those before it.
    A process holds one window, about 16 million tokens, whatever the size of the corpus.

    Args:
        folder: the prepared folder.
        shards: its shards of one split, in the manifest's order.
        file_format: "parquet" or "arrow".
        seed: of the permutations.
        window: row groups whose rows are mixed.

    Yields (on iteration): `input_ids` and, where shards hold them, `labels` (integer arrays [tokens]), `seq_lengths`,
    `sources` and `rows` (lists).
    """

    def __init__(
        self, folder: Path, shards: Sequence[Shard], file_format: str, *, seed: int = 0, window: int = WINDOW
    ) -> None:
        self.files = [folder / shard.path for shard in shards]
        self.seed, self.window, self._read = seed, window, READERS[file_format]
        sizes = [np.asarray(shard.row_groups, np.int64) for shard in shards]
        self.group_sizes: NDArray[np.int64] = np.concatenate(sizes)
        self._shard_of = np.repeat(np.arange(len(sizes)), [len(groups) for groups in sizes])
        self._first = np.searchsorted(self._shard_of, np.arange(len(sizes)))
        self.num_rows = int(self.group_sizes.sum())
        self._pass: tuple[int, NDArray[np.int64], NDArray[np.int64]] | None = None
        self._window: tuple[tuple[int, int], NDArray[np.int64], NDArray[np.int64]] | None = None
        self._groups: dict[int, dict[str, Column]] = {}  # as many as a window has

    def at(self, n: int) -> Place:
        """Where row n of the order lies."""
        (epoch,), (group,), (row,) = (part.tolist() for part in self.order(n, n + 1))
        shard = int(self._shard_of[group])
        return Place(epoch, shard, int(group - self._first[shard]), row)

    def order(self, begin: int, end: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Where rows `begin` to `end` of the order lie, int64 [rows] each: the pass, the row group, counted through all
        shards, and the row in that."""
        parts = []
        while begin < end:
            epoch, within = divmod(begin, self.num_rows)
            if self._pass is None or self._pass[0] != epoch:
                groups = np.random.default_rng([self.seed, epoch]).permutation(len(self.group_sizes))
                self._pass = epoch, groups, np.cumsum(self.group_sizes[groups]) - self.group_sizes[groups]
            _, groups, starts = self._pass
            number = int(np.searchsorted(starts, within, "right") - 1) // self.window
            if self._window is None or self._window[0] != (epoch, number):
                mixed = self._mixed(groups[number * self.window :][: self.window], epoch, number)
                self._window = (epoch, number), *mixed
            _, of, rows = self._window
            first = within - int(starts[number * self.window])
            some = slice(first, first + end - begin)
            parts.append((np.full(len(of[some]), epoch), of[some], rows[some]))
            begin += len(of[some])
        epochs, of_rows, places = (np.concatenate(part) for part in zip(*parts, strict=True))
        return epochs, of_rows, places

    def rows(self, begin: int, end: int) -> Iterator[Mapping[str, Any]]:
        """Rows `begin` to `end` of the order."""
        _, groups, rows = self.order(begin, end)
        for group, row in zip(groups.tolist(), rows.tolist(), strict=True):
            yield self.row(group, row)

    def row(self, group: int, row: int) -> dict[str, Any]:
        """A row of a row group, counted through all shards."""
        columns = self._groups.get(group)
        if columns is None:
            while len(self._groups) >= self.window:
                self._groups.pop(next(iter(self._groups)))
            columns = self._groups[group] = self._columns(group)
        return _row(columns, row)

    def piece_lengths(self, group: int) -> Column:
        """Lengths of the documents in the rows of a row group, end to end, and where each row begins in them."""
        return self._columns(group, ["seq_lengths"])["seq_lengths"]

    def piece_rows(self, group: int) -> Column:
        """Numbers of the documents in the rows of a row group in their source, as `piece_lengths`."""
        return self._columns(group, ["rows"])["rows"]

    def _mixed(self, groups: NDArray[np.int64], epoch: int, number: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The rows of a window in their order: the group of each, and its place in the group."""
        sizes = self.group_sizes[groups]
        order = np.random.default_rng([self.seed, epoch, number]).permutation(int(sizes.sum()))
        of = np.repeat(np.arange(len(groups)), sizes)[order]
        return groups[of], order - (np.cumsum(sizes) - sizes)[of]

    def _columns(self, group: int, names: list[str] | None = None) -> dict[str, Column]:
        shard = int(self._shard_of[group])
        try:
            table = self._read(self.files[shard], group - int(self._first[shard]), names)
        except (OSError, pa.ArrowInvalid) as error:
            raise PreparedDataError(
                f"{self.files[shard]} cannot be read ({error}); run hf-objectives prepare again"
            ) from error
        columns: dict[str, Column] = {}
        for name in table.column_names:
            lists = table[name].combine_chunks()
            values, offsets = lists.flatten(), lists.offsets.to_numpy().astype(np.int64)
            columns[name] = values.to_numpy() if pa.types.is_integer(values.type) else values, offsets - offsets[0]
        return columns


def _row(columns: Mapping[str, Column], i: int) -> dict[str, Any]:
    row = {name: values[offsets[i] : offsets[i + 1]] for name, (values, offsets) in columns.items()}
    return {name: value if name in ("input_ids", "labels") else value.tolist() for name, value in row.items()}


def _parquet_group(path: Path, group: int, names: list[str] | None) -> pa.Table:
    with pq.ParquetFile(path) as file:
        return file.read_row_group(group, names)


def _arrow_group(path: Path, group: int, names: list[str] | None) -> pa.Table:
    with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as reader:
        for i, batch in enumerate(reader):
            if i == group:
                return pa.Table.from_batches([batch]).select(names or batch.schema.names)
    raise pa.ArrowInvalid(f"no record batch {group}")


#: How a row group or record batch of a shard is read, all columns or some, by the shard's format.
READERS: dict[str, Callable[[Path, int, list[str] | None], pa.Table]] = {
    "parquet": _parquet_group,
    "arrow": _arrow_group,
}
