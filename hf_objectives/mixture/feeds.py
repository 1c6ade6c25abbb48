"""A source of a mixture as an endless order of units (rows, or documents), each with its size, and how to read them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_objectives.errors import ConfigError, DataError

UNITS = ("tokens", "supervised", "examples", "rows")


@dataclass(frozen=True, slots=True)
class Ahead:
    """The next units of a source.

    Attributes:
        positions: where they stand in the source's order, int64 [units].
        epochs, numbers: which pass each is in, and its number in the source, int64 [units].
        amounts: what each counts in the mixture's unit, int64 [units], each above 0.
        tokens, examples: what each holds, int64 [units].
        passes: passes of the source that are over after each, float64 [units].
    """

    positions: NDArray[np.int64]
    epochs: NDArray[np.int64]
    numbers: NDArray[np.int64]
    amounts: NDArray[np.int64]
    tokens: NDArray[np.int64]
    examples: NDArray[np.int64]
    passes: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.positions)

    def part(self, chosen: Any) -> Ahead:
        """Some of them, by slice or index."""
        return Ahead(*(getattr(self, f.name)[chosen] for f in fields(self)))

    @classmethod
    def joined(cls, parts: Sequence[Ahead]) -> Ahead:
        """Several, one after the other."""
        return cls(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(cls)))


_NONE = np.empty(0, np.int64)
NOTHING = Ahead(_NONE, _NONE, _NONE, _NONE, _NONE, _NONE, np.empty(0))


class Cursor(ABC):
    """A place in a source's order."""

    @abstractmethod
    def ahead(self, count: int) -> Ahead:
        """The next units, `count` of them or some more or fewer; none only where the source has reached `max_epochs`."""

    @abstractmethod
    def advance(self, taken: Ahead) -> None:
        """Go on behind units that `ahead` gave, from its first on."""

    @abstractmethod
    def read(self, units: Ahead) -> list[dict[str, Any]]:
        """What units hold that lie at most a block behind, without what is blocked; the caller may change the rows."""

    @abstractmethod
    def state(self) -> Any:
        """Where it stands, as JSON values."""

    def settle(self) -> None:
        """What lies behind is not read any more."""
        return


class Feed(ABC):
    """A source.

    Attributes:
        name: its name.
        max_epochs: passes after which it ends, or None.
        size: units of a pass, and None where a stream has not told.
        tokens: tokens of a pass, and None where they are not known.
    """

    name: str
    max_epochs: float | None
    size: int | None
    tokens: int | None

    @abstractmethod
    def start(self, state: Any = None) -> Cursor:
        """A cursor at the begin, or where one was."""

    @abstractmethod
    def about(self) -> Any:
        """What tells it from another source of that name, as JSON values."""

    @abstractmethod
    def pass_size(self) -> int | None:
        """What a pass counts in the mixture's unit; None where a stream has not told."""


class MappedFeed(Feed):
    """A source whose units can be looked up: an order that is a pure function of seed, name and position.

    Args:
        name: its name.
        size: units of a pass.
        seed: of the permutations; every pass has its own.
        max_epochs: passes, also broken ones.
        blocked: numbers of units that are never drawn.

    Raises:
        ConfigError: every unit is blocked.
        DataError: no units.
    """

    def __init__(
        self, name: str, size: int, *, seed: int, max_epochs: float | None, blocked: NDArray[np.int64] | None = None
    ) -> None:
        if not size:
            raise DataError("it holds no row; expected one at least", source=name)
        self.name, self.size, self.max_epochs, self._seed = name, size, max_epochs, seed
        self._blocked: NDArray[np.bool_] | None = None
        if blocked is not None and len(blocked):
            self._blocked = np.zeros(size, bool)
            self._blocked[blocked] = True
            if self._blocked.all():
                raise ConfigError(f"source {name!r}: the blocklist leaves none of its {size} rows")
        self._end = None if max_epochs is None else max(1, int(max_epochs * size))

    @abstractmethod
    def places(self, begin: int, end: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Pass and number of the units at positions `begin` to `end`, blocked ones too."""

    @abstractmethod
    def measures(self, numbers: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Amount in the mixture's unit, tokens and examples of units by number."""

    @abstractmethod
    def content(self, numbers: NDArray[np.int64]) -> list[dict[str, Any]]:
        """What units hold, by number; rows of the caller's own."""

    def start(self, state: Any = None) -> Cursor:
        """See `Feed`."""
        return _MappedCursor(self, state or 0)

    def row_id(self, number: int) -> int:
        """What names a unit in a blocklist: its number, unless rows carry one."""
        return number

    def ahead(self, begin: int, count: int) -> Ahead:
        """The next `count` units from a position on, blocked ones left out."""
        assert self.size is not None
        end = begin + count
        if self._end is not None:
            end = min(end, self._end)
        while True:
            epochs, numbers = self.places(begin, end) if begin < end else (np.empty(0, np.int64),) * 2
            positions = np.arange(begin, begin + len(numbers))
            if self._blocked is not None:
                free = ~self._blocked[numbers]
                positions, epochs, numbers = positions[free], epochs[free], numbers[free]
            if len(numbers) or end == self._end:
                break
            end = end + self.size if self._end is None else min(end + self.size, self._end)
        return Ahead(positions, epochs, numbers, *self.measures(numbers), (positions + 1) / self.size)


class _MappedCursor(Cursor):
    def __init__(self, feed: MappedFeed, position: int) -> None:
        self._feed, self._position = feed, position

    def ahead(self, count: int) -> Ahead:
        return self._feed.ahead(self._position, count)

    def advance(self, taken: Ahead) -> None:
        self._position = int(taken.positions[-1]) + 1

    def read(self, units: Ahead) -> list[dict[str, Any]]:
        return self._feed.content(units.numbers)

    def state(self) -> int:
        return self._position
