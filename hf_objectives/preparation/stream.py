"""A prepared folder as a stream without an end, shuffled anew in every epoch, with any row found at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from hf_objectives.errors import PreparedDataError
from hf_objectives.preparation.ordered_stream import OrderedStream
from hf_objectives.preparation.shards import Column, Shard, checksum_of, columns_of

Numbers = NDArray[np.int64]
T = TypeVar("T")
WINDOW = 8  # row groups of some two million tokens
_PER_TOKEN = ("input_ids", "labels", "position_ids")
_LENGTHS_KEPT = 64  # row groups


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
        verify: check each column of a row group against its checksum when it is read.

    Yields (on iteration): `input_ids`, `position_ids` and, where shards hold them, `labels` (integer arrays [tokens]),
    `seq_lengths`, `sources` and `rows` (lists).
    """

    def __init__(
        self,
        folder: Path,
        shards: Sequence[Shard],
        file_format: str,
        *,
        seed: int = 0,
        window: int = WINDOW,
        verify: bool = True,
    ) -> None:
        self.files = [folder / shard.path for shard in shards]
        self._checksums = [shard.checksums if verify else {} for shard in shards]
        self.seed, self.window, self._read = seed, window, READERS[file_format]
        sizes = [np.asarray(shard.row_groups, np.int64) for shard in shards]
        self._sizes: Numbers = np.concatenate(sizes)
        self.group_starts: Numbers = np.concatenate(([0], np.cumsum(self._sizes)))
        self._shard_of = np.repeat(np.arange(len(sizes)), [len(groups) for groups in sizes])
        self._first = np.searchsorted(self._shard_of, np.arange(len(sizes)))
        self.num_rows = int(self._sizes.sum())
        self._epoch: tuple[int, Numbers, Numbers] | None = None
        self._window: tuple[tuple[int, int], Numbers] | None = None
        self._columns: dict[int, dict[str, Column]] = {}  # of as many groups as a window has
        self._lengths: dict[int, tuple[Numbers, Numbers]] = {}

    def order(self, begin: int, end: int) -> tuple[Numbers, Numbers]:
        """Epoch and number of rows `begin` to `end` of the order, int64 [rows]; rows are numbered through all shards."""
        epochs, numbers = [], []
        while begin < end:
            epoch, within = divmod(begin, self.num_rows)
            if self._epoch is None or self._epoch[0] != epoch:
                groups = np.random.default_rng([self.seed, epoch]).permutation(len(self._sizes))
                self._epoch = epoch, groups, np.cumsum(self._sizes[groups]) - self._sizes[groups]
            _, groups, starts = self._epoch
            window = int(np.searchsorted(starts, within, "right") - 1) // self.window
            if self._window is None or self._window[0] != (epoch, window):
                shuffled = self._shuffle(groups[window * self.window :][: self.window], epoch, window)
                self._window = (epoch, window), shuffled
            first = within - int(starts[window * self.window])
            numbers.append(self._window[1][first : first + end - begin])
            epochs.append(np.full(len(numbers[-1]), epoch))
            begin += len(numbers[-1])
        return np.concatenate(epochs), np.concatenate(numbers)

    def _shuffle(self, groups: Numbers, epoch: int, window: int) -> Numbers:
        """The numbers of the rows of a window in their order."""
        sizes = self._sizes[groups]
        order = np.random.default_rng([self.seed, epoch, window]).permutation(int(sizes.sum()))
        return order + np.repeat(self.group_starts[groups] - (np.cumsum(sizes) - sizes), sizes)[order]

    def _in_groups(self, numbers: Numbers) -> tuple[Numbers, Numbers]:
        """The row group of each row, counted through all shards, and its number in the group."""
        groups = np.searchsorted(self.group_starts, numbers, "right") - 1
        return groups, numbers - self.group_starts[groups]

    def rows(self, begin: int, end: int) -> Iterator[Mapping[str, Any]]:
        """Yield rows `begin` to `end` of the order."""
        return self.read(self.order(begin, end)[1])

    def read(self, numbers: Numbers) -> Iterator[dict[str, Any]]:
        """Yield rows by their numbers."""
        groups, rows = self._in_groups(numbers)
        for group, row in zip(groups.tolist(), rows.tolist(), strict=True):
            columns = _kept(self._columns, group, self.window, self.columns)
            parts = {name: values[begins[row] : begins[row + 1]] for name, (values, begins) in columns.items()}
            yield {name: v if name in _PER_TOKEN else v.tolist() for name, v in parts.items()}

    def sizes(self, numbers: Numbers) -> tuple[Numbers, Numbers]:
        """Tokens and documents of rows by their numbers, int64 [rows]; no tokens are read."""
        tokens, documents = np.empty_like(numbers), np.empty_like(numbers)
        groups, rows = self._in_groups(numbers)
        for group in np.unique(groups).tolist():
            chosen = groups == group
            sizes = _kept(self._lengths, group, _LENGTHS_KEPT, self._group_lengths)
            tokens[chosen], documents[chosen] = (values[rows[chosen]] for values in sizes)
        return tokens, documents

    def _group_lengths(self, group: int) -> tuple[Numbers, Numbers]:
        lengths, offsets = self.columns(group, ["seq_lengths"])["seq_lengths"]
        ends = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
        return np.diff(ends[offsets]), np.diff(offsets)

    def columns(self, group: int, names: list[str] | None = None) -> dict[str, Column]:
        """Columns of a row group, counted through all shards: the values of all rows end to end, and where each row begins
        in them, int64 [rows + 1]."""
        shard = int(self._shard_of[group])
        file, within, checksums = self.files[shard], group - int(self._first[shard]), self._checksums[shard]
        try:
            table = self._read(file, within, names)
            table.validate(full=True)  # an offset beyond its values would be read all the same, and end the process
            columns = columns_of(table)
            known = {name: checksums[name][within] for name in (names or checksums) if checksums}
            changed = [name for name, checksum in known.items() if checksum_of(columns[name]) != checksum]
        except Exception as error:  # bytes that are no shard: any of Arrow's errors, of text, of shapes
            raise PreparedDataError(f"{file} cannot be read ({error}); run hf-objectives prepare again") from error
        if changed:
            raise PreparedDataError(
                f"{file}, row group {within}: {', '.join(changed)} fails its checksum; run hf-objectives prepare again"
            )
        return columns


def _kept(kept: dict[int, T], group: int, most: int, read: Callable[[int], T]) -> T:
    """What `read` gives for a row group, which is kept for the last few groups."""
    if group not in kept:
        while len(kept) >= most:
            kept.pop(next(iter(kept)))
        kept[group] = read(group)
    return kept[group]


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
