"""A stream as a source of a mixture: read forward, a buffer at a time, and resumed at the buffer where it stood."""

from __future__ import annotations

import logging
import zlib
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import IterableDataset

from hf_objectives.errors import ConfigError, DataError
from hf_objectives.mixture.feeds import NOTHING, Cursor, Feed, Integers, Units
from hf_objectives.mixture.mapped_feeds import TableFeed, blocked_rows
from hf_objectives.mixture.row_table import RowList, RowTable, is_direct
from hf_objectives.types import Row

logger = logging.getLogger(__name__)
# Turns rows as they are read, with the number of the first in its epoch, into encoded or packed ones.
Encode = Callable[[Sequence[Row], int], pa.Table]


@dataclass(frozen=True, slots=True)
class _Buffer:
    """Rows that were read together.

    Attributes:
        epoch, first: the epoch, and the number of its first row in it.
        before: the stream's own state before it; None at the beginning of an epoch, or where the stream has none.
        units: its units, shuffled.
        rows: what they hold, by number in the buffer.
        numbers: those numbers, in the order of the units.
    """

    epoch: int
    first: int
    before: Any
    units: Units
    rows: TableFeed
    numbers: Integers

    @property
    def begin(self) -> int:
        """Position of its first unit."""
        return int(self.units.positions[0])

    @property
    def last(self) -> int:
        """Position of its last unit."""
        return int(self.units.positions[-1])


class StreamFeed(Feed):
    """A `datasets.IterableDataset`, or anything that can be iterated again and again.

    It is shuffled in buffers, each permuted by seed, epoch and place, so no buffer has to be saved. A stream with
    `state_dict` and `load_state_dict`, as those of `datasets`, resumes without reading what came before. Any other is read
    again up to where it stood. Row numbers count from the beginning of an epoch.

    Args:
        name: its name.
        stream: the rows; not shuffled, since the content of a shuffle buffer cannot be resumed.
        unit: what the mixture counts.
        seed: seed of the permutations.
        max_epochs: whole epochs after which it ends.
        buffer_size: rows that are shuffled among themselves.
        encode: turns rows that are read into encoded, or packed, ones.
        columns: what each row has; None where rows are encoded.
        longest: tokens of a row that count at most.
        blocked: numbers of documents that are never drawn.

    Raises:
        ConfigError: an iterator, which cannot be read twice; a shuffled stream; a part of an epoch.
        DataError (from a cursor): an epoch without a usable row, or of another length than the first.
    """

    def __init__(
        self,
        name: str,
        stream: Iterable[Row],
        *,
        unit: str,
        seed: int,
        max_epochs: float | None,
        buffer_size: int = 1000,
        encode: Encode | None = None,
        columns: Collection[str] | None = None,
        longest: int | None = None,
        blocked: Collection[int] = (),
    ) -> None:
        if iter(stream) is stream:
            raise ConfigError(
                f"source {name!r} is an iterator, which can be read once; expected something to iterate again"
            )
        if _is_shuffled(stream):
            raise ConfigError(
                f"source {name!r} is a shuffled stream, whose buffer cannot be resumed; give it unshuffled, the mixture "
                "shuffles it"
            )
        if max_epochs is not None and (max_epochs < 1 or max_epochs % 1):
            raise ConfigError(f"source {name!r}: max_epochs is {max_epochs}; expected whole epochs of a stream")
        self.name, self.max_epochs, self.size, self.tokens = name, max_epochs, None, None
        self.stream, self.buffer_size, self._encode = stream, buffer_size, encode
        self._columns = None if columns is None else set(columns)
        self._unit, self._seed, self._longest, self._blocked = unit, seed, longest, blocked

    def start(self, state: Any = None) -> Cursor:
        """See `Feed`."""
        return _StreamCursor(self, state or {})

    def fingerprint(self) -> Any:
        """See `Feed`."""
        return ["stream", self.buffer_size]

    def epoch_size(self) -> None:
        """See `Feed`."""
        return None

    def buffers(self, epoch: int, first: int, before: Any, position: int) -> Iterator[tuple[int, _Buffer | None]]:
        """Yield the buffers of an epoch from one on, each with the number of rows of the epoch that were read with it; None
        for a buffer in which no row is usable."""
        for rows, own in _read(self.name, self.stream, self.buffer_size, first, before):
            buffer = self._buffer(rows, epoch, first, before, position)
            first, before = first + len(rows), own
            position += 0 if buffer is None else len(buffer.numbers)
            yield first, buffer

    def _buffer(self, rows: RowTable | RowList, epoch: int, first: int, before: Any, position: int) -> _Buffer | None:
        count = len(rows)
        if self._columns is not None and (odd := rows.odd(self._columns)) is not None:
            expected = f"expected {', '.join(sorted(self._columns))}, as in the first row"
            raise DataError(f"columns {', '.join(odd[1])}; {expected}", source=self.name, row=first + odd[0])
        if self._encode is not None:
            rows = RowTable(self._encode(rows.read(np.arange(count)), first))
        named = "row" in rows.names or "rows" in rows.names
        blocked = [n if named else n - first for n in self._blocked if named or n >= first]
        gone = len(blocked_rows(rows, blocked)) if blocked and len(rows) else 0
        if gone == len(rows):
            return None
        # The buffer is a source of its own, of one epoch.
        seed = zlib.crc32(f"{self._seed} {epoch} {first}".encode())
        table = TableFeed(
            self.name, rows, unit=self._unit, seed=seed, max_epochs=1, longest=self._longest, blocked=blocked
        )
        units = table.ahead(0, len(rows))
        placed = replace(
            units,
            positions=np.arange(position, position + len(units)),
            epochs=np.full(len(units), epoch),
            numbers=units.numbers + first,
            epochs_done=first + (np.arange(len(units)) + 1) * count / len(units),
        )
        return _Buffer(epoch, first, before, placed, table, units.numbers)


class _StreamCursor(Cursor):
    """`Cursor` of a stream. `epochs_done` of its units has fractions once the length of an epoch is known."""

    def __init__(self, feed: StreamFeed, state: Mapping[str, Any]) -> None:
        self._feed, self._origin = feed, dict(state)
        self._untouched = True
        self._size: int | None = state.get("size")  # rows of an epoch
        self._position: int = state.get("position", 0)
        self._epoch: int = state.get("epoch", 0)
        self._end = self._position - state.get("within", 0)  # the position behind the buffers that are held
        self._rows_read: int = state.get("first", 0)  # of the epoch
        self._usable = bool(self._rows_read)
        self._held: deque[_Buffer] = deque()
        self._reading = feed.buffers(self._epoch, self._rows_read, state.get("stream"), self._end)

    def ahead(self, count: int) -> Units:
        while self._end - self._position < count and self._fill():
            pass
        parts = []
        for buffer in self._held:
            units = buffer.units
            share = units.epochs_done / self._size if self._size else np.zeros(len(units))
            told = replace(units, epochs_done=buffer.epoch + share)
            parts.append(told.part(slice(max(0, self._position - buffer.begin), None)))
        return Units.joined(parts) if parts else NOTHING

    def _fill(self) -> bool:
        """Hold another buffer; False at the end of all epochs."""
        most, self._untouched = self._feed.max_epochs, False
        while most is None or self._epoch < most:
            read = next(self._reading, None)
            if read is None:
                self._end_epoch()
                continue
            self._rows_read, buffer = read
            if buffer is not None:
                self._usable = True
                self._held.append(buffer)
                self._end += len(buffer.numbers)
                return True
        return False

    def _end_epoch(self) -> None:
        if not self._usable:
            raise DataError(
                f"{self._rows_read:,} rows in epoch {self._epoch}, none of them usable; expected one at least",
                source=self._feed.name,
            )
        if self._size is not None and self._rows_read != self._size:
            raise DataError(
                f"epoch {self._epoch} ended after {self._rows_read:,} rows, the ones before had {self._size:,}; expected "
                "the same rows in every epoch",
                source=self._feed.name,
            )
        self._size, self._rows_read, self._usable = self._rows_read, 0, False
        self._epoch += 1
        self._reading = self._feed.buffers(self._epoch, 0, None, self._end)

    def advance(self, taken: Units) -> None:
        self._position = int(taken.positions[-1]) + 1

    def settle(self) -> None:
        while self._held and self._held[0].last < self._position:
            self._held.popleft()

    def read(self, units: Units) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = [{}] * len(units)
        begins = np.array([buffer.begin for buffer in self._held])
        holder = np.searchsorted(begins, units.positions, "right") - 1
        for i in np.unique(holder).tolist():
            chosen, buffer = np.flatnonzero(holder == i), self._held[i]
            rows = buffer.rows.content(buffer.numbers[units.positions[chosen] - begins[i]])
            for place, row in zip(chosen.tolist(), rows, strict=True):
                found[place] = row
        return found

    def state(self) -> dict[str, Any]:
        if self._untouched:  # it had no weight so far, and is not read for this
            return self._origin
        place = {"position": self._position, "size": self._size}
        while self._end > self._position or self._fill():
            for buffer in self._held:
                if buffer.last >= self._position:
                    within = {"stream": buffer.before, "within": self._position - buffer.begin}
                    return {**place, "epoch": buffer.epoch, "first": buffer.first, **within}
        return {**place, "epoch": self._epoch}


def _read(
    name: str, stream: Iterable[Row], size: int, first: int, before: Any
) -> Iterator[tuple[RowTable | RowList, Any]]:
    """Yield the rows of an epoch from number `first` on, `size` at a time, each with the stream's own state behind them."""
    if isinstance(stream, IterableDataset):
        features = stream.features
        arrow = features is not None and all(is_direct(column.type) for column in features.arrow_schema)
        # Not iter(stream), which in a loader worker reads that worker's shards alone; and a state of its own.
        fresh = stream.with_format("arrow" if arrow else None)
        if before is not None:
            fresh.load_state_dict(before)
        for batch in fresh.iter(size):
            yield RowTable(batch) if arrow else RowList(_transposed(batch)), fresh.state_dict()
        return
    own = getattr(stream, "state_dict", None)
    if before is not None:
        stream.load_state_dict(before)  # type: ignore[attr-defined]
    elif first:
        logger.info("source %r has no state of its own and is read again up to row %s", name, f"{first:,}")
    rest = iter(stream) if before is not None else islice(stream, first, None)
    while batch := list(islice(rest, size)):
        yield RowList(batch), None if own is None else own()


def _transposed(batch: Mapping[str, Sequence[Any]]) -> list[Row]:
    return [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]


def _is_shuffled(stream: Any) -> bool:
    """Whether a stream of `datasets` holds a shuffle buffer, whose content its state leaves out."""
    inner = getattr(stream, "_ex_iterable", None)
    while inner is not None:
        if type(inner).__name__ == "BufferShuffledExamplesIterable":
            return True
        inner = getattr(inner, "ex_iterable", None)
    return False
