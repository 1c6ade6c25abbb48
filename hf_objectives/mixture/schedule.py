"""The order of draws from weighted sources: at every moment each source has had its share, to within one draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from heapq import heappop, heappush
from math import inf
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hf_objectives.errors import ConfigError

_BLOCK = 1 << 16  # draws that are ordered at a time


class Schedule:
    """Decides which source the next draw is from, for draws of any sizes.

    Worst-case fair weighted fair queueing (Bennett and Zhang, "WF2Q", INFOCOM 1996): of the sources that are not ahead of
    their share, take the one whose next draw is due first. With draws of equal size this is Tijdeman's chairman assignment
    (Discrete Mathematics 32, 1980), also where weights change: after any number of units every source is within one draw
    of what is due to it. With draws of any size and constant weights no source is ahead by more than one draw of its own,
    nor behind by more than the largest draw. Nothing is random.

    `weights`, [sources], are normalised; a source of weight 0 is never drawn. `later` ones come each with the number of
    units drawn in all from which on they hold, ascending.

    Attributes:
        units: units drawn in all (draws, tokens), an int.
        drawn: int64 [sources], units drawn of each source.
        waits_for: the source whose next draw must be known to go on; None where the last `draw` stopped at its limit.
    """

    def __init__(self, weights: ArrayLike, later: Sequence[tuple[int, ArrayLike]] = ()) -> None:
        first = normalised(weights)
        pieces = [(0, first), *((begin, normalised(changed)) for begin, changed in later)]
        for _, changed in pieces:
            if len(changed) != len(first):
                raise ConfigError(f"{len(changed)} weights for {len(first)} sources; expected one a source")
        self._begins = np.array([begin for begin, _ in pieces])
        self._planned = np.stack([changed for _, changed in pieces])
        self.units = 0
        self.drawn = np.zeros(len(first), np.int64)
        self.waits_for: int | None = None
        self._retired: set[int] = set()
        self._lay(0, np.zeros(len(first)))

    def _lay(self, since: int, due: NDArray[np.float64]) -> None:
        """Set what will be due to each source from `since` on: straight lines between the units at which weights change."""
        now = int(np.searchsorted(self._begins, since, "right")) - 1
        self._knots = np.concatenate(([since], self._begins[now + 1 :])).astype(np.float64)
        weights = self._planned[now:].copy()
        weights[:, list(self._retired)] = 0
        total = weights.sum(axis=1, keepdims=True)
        self._slopes = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
        rises = np.cumsum(np.diff(self._knots)[:, None] * self._slopes[:-1], axis=0)
        self._due = due + np.concatenate([np.zeros((1, len(due))), rises])

    @property
    def weights(self) -> NDArray[np.float64]:
        """The current shares, float64 [sources], which sum to one; all 0 where every source with a weight has retired."""
        return self._slopes[np.searchsorted(self._knots, self.units, "right") - 1]

    @property
    def due(self) -> NDArray[np.float64]:
        """Units that each source should have had by now, float64 [sources]."""
        return self.due_at(self.units)

    def due_at(self, units: float) -> NDArray[np.float64]:
        """Units that each source should have had when this many are drawn in all, float64 [sources]."""
        piece = int(np.searchsorted(self._knots, units, "right")) - 1
        return self._due[piece] + self._slopes[piece] * (units - self._knots[piece])

    @property
    def ever(self) -> NDArray[np.bool_]:
        """Which sources have a weight at any time, bool [sources]; the others are never waited for."""
        return self._slopes.any(axis=0)

    def retire(self, source: int) -> None:
        """Draw no more of a source; its share, and what it has not had yet, go to the others in proportion."""
        due = self.due
        left, due[source] = due[source] - self.drawn[source], self.drawn[source]
        self._retired.add(source)
        self._lay(self.units, due)
        self._lay(self.units, due + left * self.weights)

    def draw(self, sizes: Sequence[ArrayLike], limit: int | None = None) -> NDArray[np.int64]:
        """Draw in order, `limit` times at most, as far as the known sizes of each source's next draws decide the order.

        Returns the source of each draw, int64 [draws]. Empty where a source that is due has no known draw.
        """
        starts, due, sources, lengths = self._tags(sizes)
        arrival = np.argsort(starts, kind="stable")
        unknown = lengths[arrival] == 0
        rank = np.empty(len(arrival), np.int64)  # a draw's place in the order of due times, ties by source
        rank[np.lexsort((sources[arrival], unknown, due[arrival]))] = np.arange(len(arrival))
        by_rank = np.empty((2, len(arrival)), np.int64)
        by_rank[:, rank] = sources[arrival], lengths[arrival]
        most = len(arrival) if limit is None else limit
        order, stopped = _earliest_due(starts[arrival].tolist(), rank.tolist(), by_rank[1].tolist(), self.units, most)
        self.waits_for = None if stopped is None else int(by_rank[0, stopped])
        taken, amounts = by_rank[:, order]
        self.units += int(amounts.sum())
        self.drawn += np.bincount(taken, amounts, len(self.drawn)).astype(np.int64)
        return taken

    def _tags(self, sizes: Sequence[ArrayLike]) -> tuple[NDArray, NDArray, NDArray[np.int64], NDArray[np.int64]]:
        """For each known draw the units drawn in all at which it may begin and at which it is due, its source and its size.
        The first unknown draw of each source is among them, of size 0, due as early as it can be."""
        starts, due, sources, lengths = [], [], [], []
        for i in np.flatnonzero(self.ever).tolist():
            known = np.asarray(sizes[i], np.int64)
            had = np.concatenate(([0], np.cumsum(known))) + self.drawn[i]
            # A draw may begin as soon as what came before it is due, and is due when all of it is.
            starts.append(self._when(i, had, "right"))
            ends = self._when(i, had, "left")
            due.append(np.append(ends[1:], starts[-1][-1]))
            sources.append(np.full(len(had), i))
            lengths.append(np.append(known, 0))
        return np.concatenate(starts), np.concatenate(due), np.concatenate(sources), np.concatenate(lengths)

    def _when(self, source: int, amounts: NDArray, side: Literal["left", "right"]) -> NDArray[np.float64]:
        """The first ("left") or last number of units drawn in all at which these amounts are due; inf for never."""
        due = self._due[:, source]
        piece = np.maximum(np.searchsorted(due, amounts, side) - 1, 0)
        slope = self._slopes[piece, source]
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            units = self._knots[piece] + (amounts - due[piece]) / slope
        return np.where(slope > 0, units, np.inf)

    def state_dict(self) -> dict[str, Any]:
        """All that the next draws depend on beside the weights, as JSON values."""
        return {
            "units": self.units,
            "drawn": self.drawn.tolist(),
            "retired": sorted(self._retired),
            "since": int(self._knots[0]),
            "due": self._due[0].tolist(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken, under the same weights."""
        if len(state["drawn"]) != len(self.drawn):
            raise ConfigError(
                f"the state is of a schedule of {len(state['drawn'])} sources, this one has {len(self.drawn)}"
            )
        self.units, self.drawn = int(state["units"]), np.array(state["drawn"], np.int64)
        self._retired = set(state["retired"])
        self._lay(int(state["since"]), np.array(state["due"], np.float64))


def _earliest_due(
    starts: list[float], rank: list[int], size_of: list[int], units: int, most: int
) -> tuple[list[int], int | None]:
    """Draws by rank: each time the lowest of those whose start has come. Stops at the first unknown one, returned too."""
    waiting: list[int] = []
    order: list[int] = []
    take, arrived = order.append, 0
    starts.append(inf)
    for _ in range(min(most, len(rank))):
        while starts[arrived] <= units:
            heappush(waiting, rank[arrived])
            arrived += 1
        if waiting:
            first = heappop(waiting)
        else:  # a source is always due; rounding may put its begin a hair later
            first = rank[arrived]
            arrived += 1
        size = size_of[first]
        if not size:
            return order, first
        take(first)
        units += size
    return order, None


def mixture_schedule(weights: ArrayLike, n: int) -> NDArray[np.int64]:
    """The source of each of n draws: after any number of them every source is within one draw of its share.

    Args:
        weights: shares of the sources, [sources]; normalised.
        n: number of draws.

    Returns:
        int64 [n], a pure function of the arguments; a shorter schedule is the beginning of a longer one.

    Raises:
        ConfigError: see `Schedule`.

    Example:
        >>> mixture_schedule([0.5, 0.25, 0.25], 8).tolist()
        [0, 1, 0, 2, 0, 1, 0, 2]
    """
    schedule, made = Schedule(weights), np.empty(n, np.int64)
    while schedule.units < n:
        begin, block = schedule.units, min(_BLOCK, n - schedule.units)
        counts = np.ceil(schedule.weights * block).astype(int) + 2
        drawn = schedule.draw([np.ones(count, np.int64) for count in counts], block)
        made[begin : begin + len(drawn)] = drawn
    return made


def normalised(weights: ArrayLike, names: Sequence[str] | None = None) -> NDArray[np.float64]:
    """Weights that sum to one, float64 [sources]; errors use the names of the sources."""
    given = np.atleast_1d(np.asarray(weights, np.float64))
    for i in np.flatnonzero(~np.isfinite(given) | (given < 0)).tolist():
        raise ConfigError(f"weight {repr(names[i]) if names else i} is {given[i]}; expected a number, 0 or more")
    if not given.any():
        named = f" ({', '.join(names)})" if names else ""
        raise ConfigError(f"{len(given)} weights{named}, none above 0; expected one at least")
    given = given / given.max()  # or the sum of huge ones is infinite
    return given / given.sum()
