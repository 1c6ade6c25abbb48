"""Sources of a mixture that are looked up by number: a mapped dataset, and a prepared folder.

A source is an order of units (rows, packed or not). A cursor is a place in this order. Streams have both too, with the same
methods; see `stream_feed`.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_objectives.errors import ConfigError, DataError
from hf_objectives.mixture.permutation import permuted
from hf_objectives.mixture.row_table import INTEGERS, Integers, RowList, RowTable
from hf_objectives.preparation import PreparedStream
from hf_objectives.types import IGNORE_INDEX


@dataclass(frozen=True, slots=True)
class Units:
    """Some units of a source, in its order.

    Attributes:
        positions: their places in the source's order, int64 [units].
        epochs, numbers: the epoch of each, and its number in the source, int64 [units].
        amounts: what each counts in the mixture's unit, int64 [units], each above 0.
        tokens, examples: what each holds, int64 [units].
        epochs_done: epochs of the source that are over after each, float64 [units].
    """

    positions: Integers
    epochs: Integers
    numbers: Integers
    amounts: Integers
    tokens: Integers
    examples: Integers
    epochs_done: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.positions)

    def part(self, chosen: Any) -> Units:
        """Some of them, by slice or index."""
        return Units(*(getattr(self, column.name)[chosen] for column in fields(self)))

    @classmethod
    def joined(cls, parts: Sequence[Units]) -> Units:
        """Several, one after the other."""
        return cls(*(np.concatenate([getattr(part, column.name) for part in parts]) for column in fields(cls)))


_NONE = np.empty(0, np.int64)
NOTHING = Units(_NONE, _NONE, _NONE, _NONE, _NONE, _NONE, np.empty(0))


@dataclass
class MappedCursor:
    """A place in the order of a source."""

    feed: MappedFeed
    position: int

    def ahead(self, count: int) -> Units:
        """The next units, about `count` of them; none only where the source has reached `max_epochs`."""
        return self.feed.ahead(self.position, count)

    def advance(self, taken: Units) -> None:
        """Go on behind units that `ahead` gave, from its first on."""
        self.position = int(taken.positions[-1]) + 1

    def read(self, units: Units) -> list[dict[str, Any]]:
        """Rows of units taken since the last `state`, without what is blocked; the caller may change them."""
        return self.feed.content(units.numbers)

    def state(self) -> int:
        """The place, as JSON values. A stream forgets what lies behind it."""
        return self.position


class MappedFeed(ABC):
    """A source whose units can be looked up: its order is a pure function of seed, name and position.

    `size` is the units of an epoch. Units whose numbers are `blocked` are never drawn. The source ends after `max_epochs`,
    a part of an epoch too.

    Attributes:
        tokens: tokens of an epoch; None where they are not known.
    """

    tokens: int | None

    def __init__(self, name: str, size: int, *, max_epochs: float | None, blocked: Integers) -> None:
        if not size:
            raise DataError("it holds no row; expected one at least", source=name)
        self.name, self.size, self.max_epochs = name, size, max_epochs
        self._blocked = np.zeros(size if len(blocked) else 0, bool)
        if len(blocked):
            self._blocked[blocked] = True
            if self._blocked.all():
                raise ConfigError(f"source {name!r}: the blocklist leaves none of its {size} rows")
        self._end = None if max_epochs is None else max(1, int(max_epochs * size))

    @abstractmethod
    def places(self, begin: int, end: int) -> tuple[Integers, Integers]:
        """Epoch and number of the units at positions `begin` to `end`, blocked ones too."""

    @abstractmethod
    def measures(self, numbers: Integers) -> tuple[Integers, Integers, Integers]:
        """Amount in the mixture's unit, tokens and examples of units by number."""

    @abstractmethod
    def content(self, numbers: Integers) -> list[dict[str, Any]]:
        """Rows of units by number; the caller may change them."""

    @abstractmethod
    def epoch_size(self) -> int:
        """What an epoch counts in the mixture's unit."""

    def start(self, state: Any) -> MappedCursor:
        """A cursor at the place of a state; None for the beginning."""
        return MappedCursor(self, state or 0)

    def fingerprint(self) -> Any:
        """What tells it from another source of that name, as JSON values."""
        return [self.size, self.tokens]

    def row_id(self, number: int) -> int:
        """The number by which a blocklist names a unit: its own, unless rows carry one."""
        return number

    def ahead(self, begin: int, count: int) -> Units:
        """The next `count` units from a position on, without blocked ones."""
        end = begin + count
        while True:
            end = end if self._end is None else min(end, self._end)
            epochs, numbers = self.places(begin, end) if begin < end else (_NONE, _NONE)
            positions = np.arange(begin, begin + len(numbers))
            if len(self._blocked):
                free = ~self._blocked[numbers]
                positions, epochs, numbers = positions[free], epochs[free], numbers[free]
            if len(numbers) or end == self._end or begin >= end:
                return Units(positions, epochs, numbers, *self.measures(numbers), (positions + 1) / self.size)
            end += self.size  # all of them are blocked


class TableFeed(MappedFeed):
    """A mapped dataset. Each epoch is a permutation of its rows; see `MappedFeed`.

    Tokens are counted where rows have `input_ids`. The examples of a packed row (`seq_lengths`) are its documents.

    Args:
        longest: tokens of a row that count at most, where longer ones are cut; None for all.
        blocked: numbers of documents that are never drawn: the `row` of a row, or its number where it has none. Of packed
            rows only the blocked documents go.
        left_out: numbers of rows that are not drawn either.
        ids: int64 [rows], numbers in the source where the table holds some of its rows only.

    Raises:
        ConfigError: tokens are to be counted, and there are no `input_ids`; or nothing is left to draw.
        DataError: there is no row, or one has no token, or no trained token where these are counted.
    """

    def __init__(
        self,
        name: str,
        table: RowTable | RowList,
        *,
        unit: str,
        seed: int,
        max_epochs: float | None,
        longest: int | None = None,
        blocked: Collection[int] = (),
        left_out: Integers = _NONE,
        ids: Integers | None = None,
    ) -> None:
        self.table, self._ids, self._seed = table, ids, seed
        self._documents = frozenset(blocked) if "rows" in table.names else frozenset[int]()
        gone = blocked_rows(table, blocked, ids) if blocked else _NONE
        super().__init__(name, len(table), max_epochs=max_epochs, blocked=np.concatenate([gone, left_out]))
        self._measure(unit, longest)

    def _measure(self, unit: str, longest: int | None) -> None:
        """Set the tokens, examples and amount of each row; None where each counts one, or has no tokens."""
        table, name = self.table, self.name
        kind = table.types().get("input_ids", "")
        if kind not in ("", INTEGERS):
            raise ConfigError(f"source {name!r}: input_ids are {kind}; expected lists of token ids")
        sizes = table.lengths("input_ids") if "input_ids" in table.names else None
        tokens = sizes if sizes is None or longest is None else np.minimum(sizes, longest)
        if tokens is not None and not tokens.all():
            raise DataError("no token; expected one at least", source=name, row=int(np.argmin(tokens)))
        if sizes is not None and "labels" in table.names and (wrong := table.lengths("labels") != sizes).any():
            raise DataError("labels and input_ids have different lengths", source=name, row=int(np.argmax(wrong)))
        examples = table.lengths("seq_lengths") if "seq_lengths" in table.names else None
        amounts = {"rows": None, "examples": examples}.get(unit, tokens)
        if unit in ("tokens", "supervised") and tokens is None:
            raise ConfigError(
                f"source {name!r} has columns {', '.join(table.names)} and no input_ids, so that its {unit} cannot be "
                "counted; give build_mixture a tokenizer, or unit='examples'"
            )
        if unit == "supervised" and "labels" in table.names:
            amounts = table.counts("labels", lambda labels: labels != IGNORE_INDEX)
            if not amounts.all():
                raise DataError("no token is trained; expected one at least", source=name, row=int(np.argmin(amounts)))
        self.tokens = None if tokens is None else int(tokens.sum())
        self._tokens, self._examples, self._amounts = tokens, examples, amounts

    def places(self, begin: int, end: int) -> tuple[Integers, Integers]:
        """See `MappedFeed`."""
        epochs, within = np.divmod(np.arange(begin, end), self.size)
        numbers = np.empty_like(within)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            chosen = epochs == epoch
            numbers[chosen] = permuted(within[chosen], self.size, (self._seed, zlib.crc32(self.name.encode()), epoch))
        return epochs, numbers

    def measures(self, numbers: Integers) -> tuple[Integers, Integers, Integers]:
        """See `MappedFeed`."""
        ones = np.ones_like(numbers)
        tokens = 0 * ones if self._tokens is None else self._tokens[numbers]
        examples = ones if self._examples is None else self._examples[numbers]
        return ones if self._amounts is None else self._amounts[numbers], tokens, examples

    def content(self, numbers: Integers) -> list[dict[str, Any]]:
        """See `MappedFeed`."""
        return _without(self.table.read(numbers), self._documents)

    def row_id(self, number: int) -> int:
        """See `MappedFeed`."""
        known = number if self._ids is None else int(self._ids[number])
        return int(self.table.read(np.array([number]))[0].get("row", known))

    def epoch_size(self) -> int:
        """See `MappedFeed`."""
        return self.size if self._amounts is None else int(self._amounts.sum())


class PreparedFeed(MappedFeed):
    """Shards of a prepared folder in the order of a `PreparedStream`, which reads row groups whole; see `MappedFeed`.

    Documents whose numbers are `blocked` are cut out of their rows. `tokens` are those in all shards. Trained tokens are
    no unit: they are not known without reading the rows.
    """

    def __init__(
        self,
        name: str,
        stream: PreparedStream,
        *,
        tokens: int,
        unit: str,
        max_epochs: float | None,
        blocked: Collection[int] = (),
    ) -> None:
        if unit == "supervised":
            raise ConfigError(
                f"source {name!r}: trained tokens of prepared rows are not known without reading them; "
                "expected unit 'tokens', 'examples' or 'rows'"
            )
        self.stream, self.tokens, self._documents, self._unit = stream, tokens, frozenset(blocked), unit
        gone = [_NONE]
        for group, start in enumerate(stream.group_starts[:-1] if blocked else ()):
            rows, offsets = stream.columns(group, ["rows"])["rows"]
            gone.append(start + _blocked_whole(rows, offsets, blocked))
        super().__init__(name, stream.num_rows, max_epochs=max_epochs, blocked=np.concatenate(gone))

    def places(self, begin: int, end: int) -> tuple[Integers, Integers]:
        """See `MappedFeed`."""
        return self.stream.order(begin, end)

    def measures(self, numbers: Integers) -> tuple[Integers, Integers, Integers]:
        """See `MappedFeed`."""
        tokens, examples = self.stream.sizes(numbers)
        amounts = {"tokens": tokens, "examples": examples, "rows": np.ones_like(numbers)}[self._unit]
        return amounts, tokens, examples

    def content(self, numbers: Integers) -> list[dict[str, Any]]:
        """See `MappedFeed`."""
        return _without(list(self.stream.read(numbers)), self._documents)

    def epoch_size(self) -> int:
        """See `MappedFeed`."""
        if self._unit == "examples":
            return int(self.stream.sizes(np.arange(self.size))[1].sum())
        return int(self.tokens or 0) if self._unit == "tokens" else self.size


# -- blocklists ------------------------------------------------------------------------------------------------------


def blocked_rows(table: RowTable | RowList, blocked: Collection[int], ids: Integers | None = None) -> Integers:
    """Rows of a table of which nothing is left when documents are blocked."""
    if "rows" in table.names:
        rows = table.column("rows").combine_chunks()
        offsets = rows.offsets.to_numpy().astype(np.int64)
        return _blocked_whole(rows.flatten().to_numpy(), offsets - offsets[0], blocked)
    if "row" in table.names:
        ids = table.column("row").to_numpy()
    if ids is not None:
        return np.flatnonzero(np.isin(ids, list(blocked)))
    numbers = np.array(sorted(blocked))
    return numbers[numbers < len(table)]


def _blocked_whole(rows: Any, offsets: Integers, blocked: Collection[int]) -> Integers:
    """Packed rows of which every document is blocked, by the numbers of the documents and where each row begins."""
    free = np.concatenate(([0], np.cumsum(~np.isin(rows, list(blocked)))))
    return np.flatnonzero(np.diff(free[offsets]) == 0)


def _without(rows: list[dict[str, Any]], blocked: Collection[int]) -> list[dict[str, Any]]:
    """Packed rows without the documents whose numbers are blocked."""
    for row in rows if blocked else ():
        keep = np.array([number not in blocked for number in row["rows"]])
        if not keep.all():
            tokens = np.repeat(keep, row["seq_lengths"])
            per_token = [name for name in ("input_ids", "labels", "position_ids") if name in row]
            row |= {name: np.asarray(row[name])[tokens] for name in per_token}
            per_document = [name for name in ("rows", "sources", "seq_lengths") if name in row]
            row |= {name: np.asarray(row[name])[keep].tolist() for name in per_document}
    return rows
