"""Lengths to bins: which bin each document goes in."""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hf_objectives.errors import ConfigError
from hf_objectives.types import check_one_of

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Packing:
    """The bin of each document, int64 [documents], and the share of the bins' capacity that is filled: 1.0 without bins."""

    num_bins: int
    bin_of: Ints
    fill: float


def pack_lengths(lengths: ArrayLike, capacity: int, *, strategy: str = "best_fit") -> Packing:
    """Put documents in as few bins as the strategy manages.

    Args:
        lengths: tokens per document, [documents], none longer than `capacity` but under "concat".
        capacity: tokens that a bin holds.
        strategy: a key of STRATEGIES.

    Raises:
        ConfigError: an unknown strategy, a capacity under 1, or a document that is longer than a bin.

    Example:
        >>> pack_lengths([3, 2, 4, 1], 5).bin_of.tolist()
        [1, 1, 0, 0]
    """
    check_one_of("strategy", strategy, STRATEGIES)
    if capacity < 1:
        raise ConfigError(f"capacity is {capacity}; expected at least 1 token")
    sizes = np.asarray(lengths, dtype=np.int64)
    if len(sizes) and sizes.min() < 0:
        raise ConfigError(f"document {int(sizes.argmin())} has length {int(sizes.min())}; expected 0 or more")
    if len(sizes) and sizes.max() > capacity and strategy != "concat":
        raise ConfigError(
            f"document {int(sizes.argmax())} has {int(sizes.max())} tokens, a bin holds {capacity}; "
            "truncate, split or drop it first"
        )
    num_bins, bin_of = STRATEGIES[strategy](sizes, capacity)
    return Packing(num_bins, bin_of, float(sizes.sum() / (num_bins * capacity)) if num_bins else 1.0)


def best_fit(lengths: Ints, capacity: int) -> tuple[int, Ints]:
    """Best-fit decreasing (Ding et al., "Fewer Truncations Improve Language Modeling", arXiv 2404.10830, section 3.2).

    Returns the number of bins and the bin of each document, int64 [documents]. They are those of the classical algorithm,
    which places one document at a time. Here documents of one length are placed together: best fit fills one bin with as
    many of them as it takes before it turns to the next, so that a group of bins with equal room is served at once.
    """
    bin_of = np.empty(len(lengths), np.int64)
    order = stable_order(capacity - lengths, capacity)
    all_counts = np.bincount(lengths)
    sizes = np.flatnonzero(all_counts)
    rooms: list[int] = []  # the remaining capacities that occur, ascending
    open_bins: dict[int, list[Ints]] = {}  # the bins of each, in groups
    num_bins, placed = 0, 0

    def keep(room: int, bins: Ints) -> None:
        if len(bins) == 0 or room == 0:
            return
        if room not in open_bins:
            bisect.insort(rooms, room)
            open_bins[room] = []
        open_bins[room].append(bins)

    for size, count in zip(sizes[::-1].tolist(), all_counts[sizes][::-1].tolist(), strict=True):
        left = count
        while left:
            smallest = bisect.bisect_left(rooms, size)
            if smallest < len(rooms):
                room = rooms[smallest]
                bins = open_bins[room].pop()
                if not open_bins[room]:
                    del open_bins[room]
                    rooms.pop(smallest)
            else:
                room = capacity
                new = -(-left // (capacity // size)) if size else 1
                bins = np.arange(num_bins, num_bins + new)
                num_bins += new
            each = room // size if size else left
            full = min(len(bins), left // each)
            bin_of[order[placed : placed + full * each]] = bins[:full].repeat(each) if each > 1 else bins[:full]
            placed, left = placed + full * each, left - full * each
            keep(room - each * size, bins[:full])
            rest = bins[full:]
            if left and len(rest):  # fewer than a bin takes
                bin_of[order[placed : placed + left]] = rest[0]
                keep(room - left * size, rest[:1])
                placed, left, rest = placed + left, 0, rest[1:]
            keep(room, rest)
    return num_bins, bin_of


def first_fit(lengths: Ints, capacity: int) -> tuple[int, Ints]:
    """First fit: each document, in order, goes to the first bin with room for it; for documents that come as a stream.

    A tree over the bins holds the largest room below each node, so that a document takes log2(bins) steps (Johnson,
    "Fast algorithms for bin packing", 1974, section 5). Arguments and results are those of `best_fit`.
    """
    leaves = 1 << max(1, len(lengths)).bit_length()
    largest = [capacity] * (2 * leaves)
    bin_of = np.empty(len(lengths), np.int64)
    num_bins = 0
    for i, length in enumerate(lengths.tolist()):
        node = 1
        while node < leaves:
            node *= 2
            if largest[node] < length:
                node += 1
        bin_of[i] = node - leaves
        num_bins = max(num_bins, node - leaves + 1)
        largest[node] -= length
        while node > 1:
            node //= 2
            room = max(largest[2 * node], largest[2 * node + 1])
            if largest[node] == room:
                break
            largest[node] = room
    return num_bins, bin_of


def concat(lengths: Ints, capacity: int) -> tuple[int, Ints]:
    """One stream, cut every `capacity` tokens. A document counts to the bin that it begins in and may go on in the next,
    so that it may be longer than a bin. Arguments and results are those of `best_fit`."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    num_bins = -(-total // capacity)
    return num_bins, np.minimum((ends - lengths) // capacity, max(0, num_bins - 1))


#: How documents are put in bins, by name.
STRATEGIES: dict[str, Callable[[Ints, int], tuple[int, Ints]]] = {
    "best_fit": best_fit,
    "first_fit": first_fit,
    "concat": concat,
}


def stable_order(values: Ints, most: int) -> Ints:
    """The stable order of values from 0 to `most`; numpy sorts sixteen bits by radix, which is faster."""
    return np.argsort(values.astype(np.uint16) if most < 1 << 16 else values, kind="stable")
