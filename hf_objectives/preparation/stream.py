"""A prepared folder as a stream without an end, shuffled anew in every epoch, with any row found at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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
Numbers = NDArray[np.int64]
WINDOW = 8  # row groups of some two million tokens


class PreparedStream(OrderedStream):
    """The packed rows of shards, epoch after epoch.

    In every epoch the row groups of all shards are permuted, and the rows of each `window` consecutive groups among
    themselves. Both depend on seed and epoch alone: row n is the same for every reader, and is found without reading the
    rows before it. A process holds one window, about 16 million tokens, whatever the size of the corpus.

    Args:
        folder: the prepared folder.
        shards: its shards of one split, in the manifest's order.
        file_format: "parquet" or "arrow".
        seed: seed of the permutations.
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
        self.group_sizes: Numbers = np.concatenate(sizes)
        self._shard_of = np.repeat(np.arange(len(sizes)), [len(groups) for groups in sizes])
        self._first = np.searchsorted(self._shard_of, np.arange(len(sizes)))
        self.num_rows = int(self.group_sizes.sum())
        self._epoch: tuple[int, Numbers, Numbers] | None = None
        self._window: tuple[tuple[int, int], Numbers, Numbers] | None = None
        self._groups: dict[int, dict[str, Column]] = {}  # as many as a window has

    def order(self, begin: int, end: int) -> tuple[Numbers, Numbers, Numbers]:
        """The places of rows `begin` to `end` of the order, int64 [rows] each: the epoch, the row group (counted through
        all shards), and the row in that group."""
        parts = []
        while begin < end:
            epoch, within = divmod(begin, self.num_rows)
            if self._epoch is None or self._epoch[0] != epoch:
                groups = np.random.default_rng([self.seed, epoch]).permutation(len(self.group_sizes))
                self._epoch = epoch, groups, np.cumsum(self.group_sizes[groups]) - self.group_sizes[groups]
            _, groups, starts = self._epoch
            number = int(np.searchsorted(starts, within, "right") - 1) // self.window
            if self._window is None or self._window[0] != (epoch, number):
                shuffled = self._shuffle(groups[number * self.window :][: self.window], epoch, number)
                self._window = (epoch, number), *shuffled
            first = within - int(starts[number * self.window])
            found, rows = (part[first : first + end - begin] for part in self._window[1:])
            parts.append((np.full(len(rows), epoch), found, rows))
            begin += len(rows)
        epochs, groups, rows = (np.concatenate(part) for part in zip(*parts, strict=True))
        return epochs, groups, rows

    def _shuffle(self, groups: Numbers, epoch: int, number: int) -> tuple[Numbers, Numbers]:
        """The rows of a window in their order: the group of each, and its number in the group."""
        sizes = self.group_sizes[groups]
        order = np.random.default_rng([self.seed, epoch, number]).permutation(int(sizes.sum()))
        within = np.repeat(np.arange(len(groups)), sizes)[order]
        return groups[within], order - (np.cumsum(sizes) - sizes)[within]

    def rows(self, begin: int, end: int) -> Iterator[Mapping[str, Any]]:
        """Yield rows `begin` to `end` of the order."""
        _, groups, rows = self.order(begin, end)
        for group, row in zip(groups.tolist(), rows.tolist(), strict=True):
            yield self.row(group, row)

    def row(self, group: int, row: int) -> dict[str, Any]:
        """A row of a row group, counted through all shards."""
        columns = self._groups.get(group)
        if columns is None:
            while len(self._groups) >= self.window:
                self._groups.pop(next(iter(self._groups)))
            columns = self._groups[group] = self.columns(group)
        found = {name: values[begins[row] : begins[row + 1]] for name, (values, begins) in columns.items()}
        return {name: value if name in ("input_ids", "labels") else value.tolist() for name, value in found.items()}

    def columns(self, group: int, names: list[str] | None = None) -> dict[str, Column]:
        """Columns of a row group, counted through all shards: the values of all rows end to end, and where each row begins
        in them, int64 [rows + 1]."""
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
