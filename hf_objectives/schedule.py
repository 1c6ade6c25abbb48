"""The order of draws from weighted sources: at every moment each source has had its share, to within one draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from heapq import heappop, heappush
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hf_objectives.errors import ConfigError

_BLOCK = 1 << 16  # draws that are ordered at a time


class Schedule:
    """Which source the next draw is from, for draws of any sizes.

    Worst-case fair weighted fair queueing (Bennett and Zhang, "WF2Q", INFOCOM 1996): of the sources that are not ahead of
    their share, the one whose next draw is due first. After any number of units no source is ahead of its share by more
    than one draw of its own, nor behind by more than the largest draw. With draws of equal size that is the bound of
    Tijdeman's chairman assignment (Discrete Mathematics 32, 1980). Nothing is random.

    Args:
        weights: shares of the sources, [sources], 0 or more; normalised. A source of weight 0 is never drawn.

    Attributes:
        weights: float64 [sources], which sum to one.
        units: units drawn in all (draws, tokens), an int.
        drawn: int64 [sources], units drawn of each source.

    Raises:
        ConfigError: no weight, one below 0 or not finite, or none above 0.
    """

    def __init__(self, weights: ArrayLike) -> None:
        self.weights = normalised(weights)
        self.units = 0
        self.drawn = np.zeros(len(self.weights), np.int64)
        # Shares add up piece by piece where weights change: what was due at `_since`, and since then by weight.
        self._due, self._since = np.zeros(len(self.weights)), 0

    @property
    def due(self) -> NDArray[np.float64]:
        """Units that each source should have had by now, float64 [sources]."""
        return self._due + self.weights * (self.units - self._since)

    def reweigh(self, weights: ArrayLike) -> None:
        """Other weights from here on; what was due so far stays due."""
        fresh = normalised(weights)
        if len(fresh) != len(self.weights):
            raise ConfigError(f"{len(fresh)} weights for {len(self.weights)} sources; expected one a source")
        self._due, self._since, self.weights = self.due, self.units, fresh

    def draw(self, sizes: Sequence[ArrayLike], limit: int | None = None) -> NDArray[np.int64]:
        """The sources of the next draws, in order, as far as the sizes that are known decide them.

        Args:
            sizes: for each source the sizes of its next draws, as many as are known, int64; each above 0.
            limit: most draws.

        Returns:
            int64 [draws]; they count as drawn. Empty where a source that is due has no known draw.
        """
        starts, due, sources, lengths = self._tags(sizes)
        arrival = np.argsort(starts, kind="stable")
        unknown = lengths[arrival] == 0
        rank = np.empty(len(arrival), np.int64)  # a draw's place in the order of due times, ties by source
        rank[np.lexsort((sources[arrival], unknown, due[arrival]))] = np.arange(len(arrival))
        by_rank = np.empty((2, len(arrival)), np.int64)
        by_rank[:, rank] = sources[arrival], lengths[arrival]
        most = len(arrival) if limit is None else limit
        order = _earliest_due(starts[arrival].tolist(), rank.tolist(), by_rank[1].tolist(), self.units, most)
        taken, amounts = by_rank[:, order]
        self.units += int(amounts.sum())
        self.drawn += np.bincount(taken, amounts, len(self.weights)).astype(np.int64)
        return taken

    def _tags(self, sizes: Sequence[ArrayLike]) -> tuple[NDArray, NDArray, NDArray[np.int64], NDArray[np.int64]]:
        """When each known draw may begin and when it is due, in units drawn in all, its source and its size; and the
        first unknown draw of each source, of size 0, due as early as it can be."""
        starts, due, sources, lengths = [], [], [], []
        for i in np.flatnonzero(self.weights).tolist():
            known = np.asarray(sizes[i], np.int64)
            had = np.concatenate(([0], np.cumsum(known))) + self.drawn[i]
            with np.errstate(over="ignore"):  # a weight next to nothing is due next to never
                at = self._since + (had - self._due[i]) / self.weights[i]
            starts.append(at)
            due.append(np.append(at[1:], at[-1]))
            sources.append(np.full(len(at), i))
            lengths.append(np.append(known, 0))
        return np.concatenate(starts), np.concatenate(due), np.concatenate(sources), np.concatenate(lengths)

    def state_dict(self) -> dict[str, Any]:
        """All that the next draws depend on, as JSON values."""
        return {
            "weights": self.weights.tolist(),
            "units": self.units,
            "drawn": self.drawn.tolist(),
            "due": self._due.tolist(),
            "since": self._since,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            ConfigError: a state of another number of sources.
        """
        if len(state["weights"]) != len(self.weights):
            raise ConfigError(
                f"the state is of a schedule of {len(state['weights'])} sources, this one has {len(self.weights)}"
            )
        self.weights, self._due = np.array(state["weights"]), np.array(state["due"])
        self.units, self._since = int(state["units"]), int(state["since"])
        self.drawn = np.array(state["drawn"], np.int64)


def mixture_schedule(weights: ArrayLike, n: int) -> NDArray[np.int64]:
    """The source of each of n draws: after any number of them every source is within one draw of its share.

    Args:
        weights: shares of the sources, [sources]; normalised.
        n: draws.

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


def normalised(weights: ArrayLike) -> NDArray[np.float64]:
    """Weights that sum to one, float64 [sources].

    Raises:
        ConfigError: no weight, one below 0 or not finite, or none above 0.
    """
    given = np.atleast_1d(np.asarray(weights, np.float64))
    wrong = np.flatnonzero(~np.isfinite(given) | (given < 0))
    if len(wrong):
        raise ConfigError(f"weight {int(wrong[0])} is {given[wrong[0]]}; expected a number, 0 or more")
    if not given.any():
        raise ConfigError(f"{len(given)} weights, none above 0; expected one at least")
    given = given / given.max()  # or the sum of huge ones is infinite
    return given / given.sum()


def _earliest_due(starts: list[float], rank: list[int], size_of: list[int], units: int, most: int) -> list[int]:
    """Draws by rank, each time the lowest of those whose start has come, up to the first that is not known."""
    waiting: list[int] = []
    order: list[int] = []
    at, count = 0, len(starts)
    while len(order) < most:
        while at < count and starts[at] <= units:
            heappush(waiting, rank[at])
            at += 1
        if not waiting:  # somebody is always due; rounding may put the begin a hair later
            heappush(waiting, rank[at])
            at += 1
        first = heappop(waiting)
        if not size_of[first]:
            break
        order.append(first)
        units += size_of[first]
    return order
