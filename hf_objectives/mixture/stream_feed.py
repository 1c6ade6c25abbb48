"""A stream as a source of a mixture: read forward, a buffer at a time, and resumed at the buffer where it stood."""

from __future__ import annotations

import logging
import zlib
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
from datasets import IterableDataset

from hf_objectives.errors import ConfigError, DataError
from hf_objectives.mixture.feeds import NOTHING, MappedCursor, MappedFeed, TableFeed, Units, blocked_rows
from hf_objectives.mixture.row_table import RowList, RowTable, gathered, is_direct
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
        units: its units, shuffled; `epochs_done` counts rows of the epoch.
        rows: what they hold, by number in the buffer.
    """

    epoch: int
    first: int
    before: Any
    units: Units
    rows: TableFeed

    @property
    def begin(self) -> int:
        """Position of its first unit."""
        return int(self.units.positions[0])

    @property
    def end(self) -> int:
        """The position behind its last unit."""
        return int(self.units.positions[-1]) + 1


class StreamFeed:
    """A `datasets.IterableDataset`, or anything that can be iterated again and again.

    It is shuffled in buffers, each permuted by seed, epoch and place, so no buffer has to be saved. A stream with
    `state_dict` and `load_state_dict`, as those of `datasets`, resumes without reading what came before. Any other is read
    again up to where it stood. Row numbers count from the beginning of an epoch.

    Args:
        buffer_size: rows that are shuffled among themselves.
        encode: turns rows that are read into encoded, or packed, ones.
        columns: what each row has; None where rows are encoded.
        longest, blocked: see `TableFeed`.

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
        self._columns = columns
        self._unit, self._seed, self._longest, self._blocked = unit, seed, longest, blocked

    def start(self, state: Any) -> StreamCursor:
        """See `MappedFeed`."""
        return StreamCursor(self, state or {})

    def fingerprint(self) -> Any:
        """See `MappedFeed`."""
        return ["stream", self.buffer_size]

    def epoch_size(self) -> None:
        """See `MappedFeed`; it is not known."""
        return None

    def buffer(self, rows: RowTable | RowList, epoch: int, first: int, before: Any, position: int) -> _Buffer | None:
        """Rows of an epoch, from number `first` on, as a buffer at a position; None where no row is usable."""
        count = len(rows)
        if self._columns is not None:
            rows.check_columns(self._columns, self.name, first)
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
        return _Buffer(epoch, first, before, placed, table)


class StreamCursor:
    """See `MappedCursor`. `epochs_done` of its units has fractions once the length of an epoch is known."""

    def __init__(self, feed: StreamFeed, state: Mapping[str, Any]) -> None:
        self._feed, self._origin, self._untouched = feed, dict(state), True
        self._size: int | None = state.get("size")  # rows of an epoch
        self._position: int = state.get("position", 0)
        self._end = self._position - state.get("within", 0)  # the position behind the buffers that are held
        self._held: deque[_Buffer] = deque()
        self._epoch: int = state.get("epoch", 0)
        self._rest = self._buffers(state.get("first", 0), state.get("stream"))

    def _buffers(self, first: int, before: Any) -> Iterator[_Buffer]:
        """Yield the buffers of this epoch from row `first` on, and of all epochs after it."""
        feed = self._feed
        while feed.max_epochs is None or self._epoch < feed.max_epochs:
            usable = first > 0
            for rows, own in _read(feed.name, feed.stream, feed.buffer_size, first, before):
                buffer = feed.buffer(rows, self._epoch, first, before, self._end)
                first, before = first + len(rows), own
                if buffer is not None:
                    usable, self._end = True, buffer.end
                    yield buffer
            if not usable:
                raise DataError(
                    f"{first:,} rows in epoch {self._epoch}, none of them usable; expected one at least",
                    source=feed.name,
                )
            if self._size is not None and first != self._size:
                raise DataError(
                    f"epoch {self._epoch} ended after {first:,} rows, the ones before had {self._size:,}; expected the "
                    "same rows in every epoch",
                    source=feed.name,
                )
            self._size, self._epoch, first, before = first, self._epoch + 1, 0, None

    def _fill(self) -> bool:
        """Hold another buffer; False at the end of all epochs."""
        self._untouched = False
        buffer = next(self._rest, None)
        if buffer is not None:
            self._held.append(buffer)
        return buffer is not None

    def ahead(self, count: int) -> Units:
        """See `MappedCursor`."""
        while self._end - self._position < count and self._fill():
            pass
        parts = [NOTHING]
        for buffer in self._held:
            units = buffer.units
            share = units.epochs_done / self._size if self._size else np.zeros(len(units))
            told = replace(units, epochs_done=buffer.epoch + share)
            parts.append(told.part(slice(max(0, self._position - buffer.begin), None)))
        return Units.joined(parts)

    def advance(self, taken: Units) -> None:
        """See `MappedCursor`."""
        self._position = int(taken.positions[-1]) + 1

    def read(self, units: Units) -> list[dict[str, Any]]:
        """See `MappedCursor`."""
        begins = np.array([buffer.begin for buffer in self._held])
        holders = np.searchsorted(begins, units.positions, "right") - 1
        return gathered(
            holders, lambda i, chosen: self._held[i].rows.content(units.numbers[chosen] - self._held[i].first)
        )

    def state(self) -> dict[str, Any]:
        """See `MappedCursor`."""
        if self._untouched:  # it had no weight so far, and is not read for this
            return self._origin
        while not self._held or self._held[0].end <= self._position:
            if self._held:
                self._held.popleft()
            elif not self._fill():
                return {"position": self._position, "size": self._size, "epoch": self._epoch}
        buffer = self._held[0]
        return {
            "position": self._position,
            "size": self._size,
            "epoch": buffer.epoch,
            "first": buffer.first,
            "stream": buffer.before,
            "within": self._position - buffer.begin,
        }


Feed: TypeAlias = MappedFeed | StreamFeed
Cursor: TypeAlias = MappedCursor | StreamCursor


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
