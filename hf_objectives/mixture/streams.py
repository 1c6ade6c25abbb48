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
from numpy.typing import NDArray

from hf_objectives.errors import ConfigError, DataError
from hf_objectives.mixture.feeds import NOTHING, Ahead, Cursor, Feed
from hf_objectives.mixture.row_table import RowList, RowTable, is_direct
from hf_objectives.mixture.table_feed import TableFeed, numbers_of
from hf_objectives.types import Row

logger = logging.getLogger(__name__)
# Rows as they are read, and the number of the first in its pass, to encoded or packed ones.
Encode = Callable[[Sequence[Row], int], pa.Table]


@dataclass(frozen=True, slots=True)
class _Buffer:
    """Rows that were read together.

    Attributes:
        epoch, first: the pass, and the number of its first row in it.
        before: the stream's own state before it; None at the begin of a pass, or where the stream has none.
        order: its units, shuffled, as `Ahead`.
        rows: what they hold, by number in the buffer.
        numbers: those numbers, in the order.
    """

    epoch: int
    first: int
    before: Any
    order: Ahead
    rows: TableFeed
    numbers: NDArray[np.int64]


class StreamFeed(Feed):
    """A `datasets.IterableDataset`, or anything that can be iterated again and again.

    It is shuffled in buffers, each permuted by seed, pass and place, so that no buffer has to be saved. A stream with
    `state_dict` and `load_state_dict`, as those of `datasets`, resumes without reading what came before; any other is read
    again up to where it stood. Row numbers count from the begin of a pass.

    Args:
        name: its name.
        stream: the rows; not shuffled, since the content of a shuffle buffer cannot be resumed.
        unit: what the mixture counts.
        seed: of the permutations.
        max_epochs: whole passes after which it ends.
        buffer_size: rows that are shuffled among themselves.
        encode: what makes encoded, or packed, rows of those that are read.
        columns: what each row has; None where rows are encoded.
        longest: tokens of a row that count at most.
        blocked: numbers of documents that are never drawn.

    Raises:
        ConfigError: an iterator, which cannot be read twice; a shuffled stream; a broken number of passes.
        DataError (from a cursor): a pass without a usable row, or of another length than the first.
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
            raise ConfigError(f"source {name!r}: max_epochs is {max_epochs}; expected whole passes of a stream")
        self.name, self.max_epochs, self.size, self.tokens = name, max_epochs, None, None
        self.stream, self.buffer_size, self._encode = stream, buffer_size, encode
        self._columns = None if columns is None else set(columns)
        self._unit, self._seed, self._longest, self._blocked = unit, seed, longest, blocked

    def start(self, state: Any = None) -> Cursor:
        """See `Feed`."""
        return _StreamCursor(self, state or {})

    def about(self) -> Any:
        """See `Feed`."""
        return ["stream", self.buffer_size]

    def pass_size(self) -> None:
        """See `Feed`."""
        return None

    def buffers(self, epoch: int, first: int, before: Any, position: int) -> Iterator[tuple[int, _Buffer | None]]:
        """Buffers of a pass from one on, each with the rows of the pass that were read with it; None for one in which no
        row is usable."""
        for rows, own in _read(self.name, self.stream, self.buffer_size, first, before):
            buffer = self._buffer(rows, epoch, first, before, position)
            first, before = first + len(rows), own
            position += 0 if buffer is None else len(buffer.numbers)
            yield first, buffer

    def _buffer(self, rows: RowTable | RowList, epoch: int, first: int, before: Any, position: int) -> _Buffer | None:
        count = len(rows)
        if self._columns is not None and (odd := rows.odd(self._columns)) is not None:
            raise DataError(
                f"columns {', '.join(odd[1])}; expected {', '.join(sorted(self._columns))}, as in the first row",
                source=self.name,
                row=first + odd[0],
            )
        if self._encode is not None:
            rows = RowTable(self._encode(rows.read(np.arange(len(rows))), first))
        named = "row" in rows.names or "rows" in rows.names
        blocked = [n if named else n - first for n in self._blocked if named or n >= first]
        gone = len(numbers_of(rows, blocked)) if blocked and len(rows) else 0
        if gone == len(rows):
            return None
        # The buffer is a source of its own, of one pass.
        seed = zlib.crc32(f"{self._seed} {epoch} {first}".encode())
        table = TableFeed(
            self.name, rows, unit=self._unit, seed=seed, max_epochs=1, longest=self._longest, blocked=blocked
        )
        order = table.ahead(0, len(rows))
        at = np.arange(position, position + len(order))
        done = first + (np.arange(len(order)) + 1) * count / len(order)
        placed = replace(
            order, positions=at, epochs=np.full(len(at), epoch), numbers=order.numbers + first, passes=done
        )
        return _Buffer(epoch, first, before, placed, table, order.numbers)


class _StreamCursor(Cursor):
    """`Cursor` of a stream. `passes` of its units are broken ones once the length of a pass is known, whole before."""

    def __init__(self, feed: StreamFeed, state: Mapping[str, Any]) -> None:
        self._feed, self._origin = feed, dict(state)
        self._untouched = True
        self._size: int | None = state.get("size")  # rows of a pass
        self._position: int = state.get("position", 0)
        self._epoch: int = state.get("epoch", 0)
        self._end = self._position - state.get("within", 0)  # the position behind what is held
        self._rows_read: int = state.get("first", 0)  # of the pass
        self._usable = bool(self._rows_read)
        self._held: deque[_Buffer] = deque()
        self._reading = feed.buffers(self._epoch, self._rows_read, state.get("stream"), self._end)

    def ahead(self, count: int) -> Ahead:
        while self._end - self._position < count and self._fill():
            pass
        parts = [
            self._passes(b).part(slice(max(0, self._position - int(b.order.positions[0])), None)) for b in self._held
        ]
        if not parts:
            return NOTHING
        return Ahead.joined(parts)

    def _passes(self, buffer: _Buffer) -> Ahead:
        share = buffer.order.passes / self._size if self._size else np.zeros(len(buffer.order))
        return replace(buffer.order, passes=buffer.epoch + share)

    def _fill(self) -> bool:
        """Hold another buffer; False at the end of all passes."""
        most, self._untouched = self._feed.max_epochs, False
        while most is None or self._epoch < most:
            read = next(self._reading, None)
            if read is None:
                self._end_of_pass()
                continue
            self._rows_read, buffer = read
            if buffer is not None:
                self._usable = True
                self._held.append(buffer)
                self._end += len(buffer.numbers)
                return True
        return False

    def _end_of_pass(self) -> None:
        if not self._usable:
            raise DataError(
                f"{self._rows_read:,} rows in pass {self._epoch}, none of them usable; expected one at least",
                source=self._feed.name,
            )
        if self._size is not None and self._rows_read != self._size:
            raise DataError(
                f"pass {self._epoch} ended after {self._rows_read:,} rows, the ones before had {self._size:,}; expected "
                "the same rows in every pass",
                source=self._feed.name,
            )
        self._size, self._rows_read, self._usable = self._rows_read, 0, False
        self._epoch += 1
        self._reading = self._feed.buffers(self._epoch, 0, None, self._end)

    def advance(self, taken: Ahead) -> None:
        self._position = int(taken.positions[-1]) + 1

    def settle(self) -> None:
        while self._held and int(self._held[0].order.positions[-1]) < self._position:
            self._held.popleft()

    def read(self, units: Ahead) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = [{}] * len(units)
        begins = np.array([int(buffer.order.positions[0]) for buffer in self._held])
        of = np.searchsorted(begins, units.positions, "right") - 1
        for i in np.unique(of).tolist():
            mine, buffer = np.flatnonzero(of == i), self._held[i]
            rows = buffer.rows.content(buffer.numbers[units.positions[mine] - begins[i]])
            for at, row in zip(mine.tolist(), rows, strict=True):
                found[at] = row
        return found

    def state(self) -> dict[str, Any]:
        if self._untouched:  # of no weight so far, and not to be read for this
            return self._origin
        at = {"position": self._position, "size": self._size}
        while self._end > self._position or self._fill():
            for buffer in self._held:
                if int(buffer.order.positions[-1]) >= self._position:
                    within = self._position - int(buffer.order.positions[0])
                    return {
                        **at,
                        "epoch": buffer.epoch,
                        "first": buffer.first,
                        "stream": buffer.before,
                        "within": within,
                    }
        return {**at, "epoch": self._epoch}


def _read(
    name: str, stream: Iterable[Row], size: int, first: int, before: Any
) -> Iterator[tuple[RowTable | RowList, Any]]:
    """Rows of a pass from number `first` on, `size` at a time, each with the stream's own state behind them."""
    if isinstance(stream, IterableDataset):
        features = stream.features
        arrow = features is not None and all(is_direct(field.type) for field in features.arrow_schema)
        # Not iter(stream), which in a loader worker reads that worker's shards alone; and a state of its own.
        fresh = stream.with_format("arrow" if arrow else None)
        if before is not None:
            fresh.load_state_dict(before)
        for batch in fresh.iter(size):
            rows = RowTable(batch) if arrow else RowList(_transposed(batch))
            yield rows, fresh.state_dict()
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
