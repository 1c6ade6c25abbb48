"""A source of a mixture as an order of units (rows, or documents): their sizes, and how to read them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_objectives.errors import ConfigError, DataError

Integers = NDArray[np.int64]


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


class Cursor(ABC):
    """A place in a source's order."""

    @abstractmethod
    def ahead(self, count: int) -> Units:
        """The next units, about `count` of them; none only where the source has reached `max_epochs`."""

    @abstractmethod
    def advance(self, taken: Units) -> None:
        """Go on behind units that `ahead` gave, from its first on."""

    @abstractmethod
    def read(self, units: Units) -> list[dict[str, Any]]:
        """Rows of units that lie at most a block behind, without what is blocked; the caller may change them."""

    @abstractmethod
    def state(self) -> Any:
        """The place, as JSON values."""

    def settle(self) -> None:
        """Forget what lies behind; it is not read any more."""
        return


class Feed(ABC):
    """A source of a mixture.

    Attributes:
        name: its name.
        max_epochs: epochs after which it ends, or None.
        size: units of an epoch; None for a stream.
        tokens: tokens of an epoch; None where they are not known.
    """

    name: str
    max_epochs: float | None
    size: int | None
    tokens: int | None

    @abstractmethod
    def start(self, state: Any = None) -> Cursor:
        """A cursor at the beginning, or at the place of a state."""

    @abstractmethod
    def fingerprint(self) -> Any:
        """What tells it from another source of that name, as JSON values."""

    @abstractmethod
    def epoch_size(self) -> int | None:
        """What an epoch counts in the mixture's unit; None for a stream."""


class MappedFeed(Feed):
    """A source whose units can be looked up: its order is a pure function of seed, name and position.

    Args:
        name: its name.
        size: units of an epoch.
        max_epochs: epochs after which it ends; a part of an epoch too.
        blocked: numbers of units that are never drawn.

    Raises:
        ConfigError: every unit is blocked.
        DataError: there is no unit.
    """

    def __init__(self, name: str, size: int, *, max_epochs: float | None, blocked: Integers = _NONE) -> None:
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

    def start(self, state: Any = None) -> Cursor:
        """See `Feed`."""
        return _MappedCursor(self, state or 0)

    def fingerprint(self) -> Any:
        """See `Feed`."""
        return [self.size, self.tokens]

    def row_id(self, number: int) -> int:
        """The number by which a blocklist names a unit: its own, unless rows carry one."""
        return number

    def ahead(self, begin: int, count: int) -> Units:
        """The next `count` units from a position on, without blocked ones."""
        assert self.size is not None
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


class _MappedCursor(Cursor):
    def __init__(self, feed: MappedFeed, position: int) -> None:
        self._feed, self._position = feed, position

    def ahead(self, count: int) -> Units:
        return self._feed.ahead(self._position, count)

    def advance(self, taken: Units) -> None:
        self._position = int(taken.positions[-1]) + 1

    def read(self, units: Units) -> list[dict[str, Any]]:
        return self._feed.content(units.numbers)

    def state(self) -> int:
        return self._position
