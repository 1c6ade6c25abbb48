"""Documents into rows of a fixed length: which document goes where, and the rows that come of it, all in arrays."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from hf_objectives.errors import ConfigError, nearest
from hf_objectives.types import IGNORE_INDEX

OVERFLOW = ("truncate", "split", "drop")
_LONG = 200  # tokens of a piece from which on it pays to copy pieces, not tokens
_GATHERED = 1 << 15  # tokens
_CHUNKS_A_THREAD = 32  # fewer are copied before a thread has started


@dataclass(frozen=True, slots=True)
class Packing:
    """Which bin each document is in.

    Attributes:
        num_bins: number of bins.
        bin_of: int64 [documents], the bin of each document, from 0.
        fill: share of the bins' capacity that documents fill, 1.0 when there are no bins.
    """

    num_bins: int
    bin_of: NDArray[np.int64]
    fill: float


def best_fit(lengths: NDArray[np.int64], capacity: int) -> tuple[int, NDArray[np.int64]]:
    """Best-fit decreasing (Ding et al., "Fewer Truncations Improve Language Modeling", arXiv 2404.10830, section 3.2).

    Documents of one length are placed together: best fit fills one bin with as many of them as it takes before it turns
    to the next bin, so that a whole group of bins with equal room is served at once. The bins are those of the classical
    algorithm, which places one document at a time.

    Args:
        lengths: int64 [documents], each at most `capacity`.
        capacity: room of a bin.

    Returns:
        The number of bins and int64 [documents], the bin of each document.
    """
    bin_of = np.empty(len(lengths), np.int64)
    order = _sorted(capacity - lengths, capacity)
    all_counts = np.bincount(lengths)
    sizes = np.flatnonzero(all_counts)
    counts = all_counts[sizes]
    rooms: list[int] = []  # the remaining capacities that occur, ascending
    open_bins: dict[int, list[NDArray[np.int64]]] = {}
    num_bins, at = 0, 0

    def keep(room: int, bins: NDArray[np.int64]) -> None:
        if len(bins) == 0 or room == 0:
            return
        if room not in open_bins:
            bisect.insort(rooms, room)
            open_bins[room] = []
        open_bins[room].append(bins)

    for size, count in zip(sizes[::-1].tolist(), counts[::-1].tolist(), strict=True):
        left = count
        while left:
            place = bisect.bisect_left(rooms, size)
            if place < len(rooms):
                room = rooms[place]
                bins = open_bins[room].pop()
                if not open_bins[room]:
                    del open_bins[room]
                    rooms.pop(place)
            else:
                room = capacity
                new = -(-left // (capacity // size)) if size else 1
                bins = np.arange(num_bins, num_bins + new)
                num_bins += new
            each = room // size if size else left
            full = min(len(bins), left // each)
            bin_of[order[at : at + full * each]] = bins[:full].repeat(each) if each > 1 else bins[:full]
            at, left = at + full * each, left - full * each
            keep(room - each * size, bins[:full])
            rest = bins[full:]
            if left and len(rest):  # fewer than a bin takes
                bin_of[order[at : at + left]] = rest[0]
                keep(room - left * size, rest[:1])
                at, left, rest = at + left, 0, rest[1:]
            keep(room, rest)
    return num_bins, bin_of


def first_fit(lengths: NDArray[np.int64], capacity: int) -> tuple[int, NDArray[np.int64]]:
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


def concat(lengths: NDArray[np.int64], capacity: int) -> tuple[int, NDArray[np.int64]]:
    """One stream, cut every `capacity` tokens: a document counts to the bin that it begins in and may go on in the next,
    so that it may be longer than a bin. Arguments and results are those of `best_fit`."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    num_bins = -(-total // capacity)
    return num_bins, np.minimum((ends - lengths) // capacity, max(0, num_bins - 1))


#: How documents are put in bins, by name.
STRATEGIES: dict[str, Callable[[NDArray[np.int64], int], tuple[int, NDArray[np.int64]]]] = {
    "best_fit": best_fit,
    "first_fit": first_fit,
    "concat": concat,
}


def pack_lengths(lengths: ArrayLike, capacity: int, *, strategy: str = "best_fit") -> Packing:
    """Put documents in as few bins as the strategy manages; a pure function of its arguments.

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
    if strategy not in STRATEGIES:
        raise ConfigError(
            f"unknown packing strategy {strategy!r}; expected one of {', '.join(STRATEGIES)}{nearest(strategy, STRATEGIES)}"
        )
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


@dataclass(frozen=True, slots=True)
class PackedRows:
    """Rows of packed documents, or pieces of documents.

    Attributes:
        starts: int64 [pieces], where each piece began in the flat input, in the order of the rows.
        lengths: int64 [pieces], tokens of each piece.
        row_offsets: int64 [rows + 1], the tokens of row i are those from `row_offsets[i]` to `row_offsets[i + 1]`.
        piece_offsets: int64 [rows + 1], row i holds pieces `piece_offsets[i]:piece_offsets[i + 1]`.
        documents: int64 [pieces], the document that each piece is of.
        dropped: int64 [documents], tokens of each document that no row holds.
    """

    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    row_offsets: NDArray[np.int64]
    piece_offsets: NDArray[np.int64]
    documents: NDArray[np.int64]
    dropped: NDArray[np.int64]

    def gather(self, flat: NDArray) -> NDArray:
        """The tokens of all rows end to end, [tokens] of the dtype of `flat`, the documents' tokens end to end."""
        return self.gather_all([flat])[0]

    def gather_all(self, flats: Sequence[NDArray]) -> list[NDArray]:
        """`gather` of several arrays of the same documents, ids and labels say."""
        total = int(self.lengths.sum())
        if total >= _LONG * max(1, len(self.lengths)):
            with ThreadPoolExecutor(len(flats)) as pool:
                return list(pool.map(self._by_piece, flats))
        return self._by_token(flats, total)

    def _by_piece(self, flat: NDArray) -> NDArray:
        """Arrow copies each piece whole, without Python in between."""
        bits = flat.view(f"u{flat.itemsize}")  # Arrow packs bools
        pieces = pa.LargeListViewArray.from_arrays(pa.array(self.starts), pa.array(self.lengths), pa.array(bits))
        joined = pieces.flatten()
        if np.may_share_memory(joined.to_numpy(), flat):  # one piece is a view, not a copy
            return joined.to_numpy().copy().view(flat.dtype)
        return np.frombuffer(joined.buffers()[1], flat.dtype, len(joined))

    def _by_token(self, flats: Sequence[NDArray], total: int) -> list[NDArray]:
        """Several short pieces at once, by the index of each token."""
        rows = [np.empty(total, flat.dtype) for flat in flats]
        begins = np.cumsum(self.lengths) - self.lengths
        # Some thousand tokens at a time: what is in the cache is copied several times as fast.
        cuts = np.unique(np.append(np.searchsorted(begins, np.arange(0, total, _GATHERED)), len(begins)))

        def copy(bounds: NDArray[np.int64]) -> None:
            for a, b in itertools.pairwise(bounds.tolist()):
                first, last = int(begins[a]), int(begins[b - 1] + self.lengths[b - 1])
                index = (self.starts[a:b] - begins[a:b]).repeat(self.lengths[a:b])
                index += np.arange(first, last)
                for flat, row in zip(flats, rows, strict=True):
                    flat.take(index, out=row[first:last], mode="clip")

        threads = max(1, min(pa.cpu_count(), len(cuts) // _CHUNKS_A_THREAD))
        shares = [cuts[i * len(cuts) // threads : (i + 1) * len(cuts) // threads + 1] for i in range(threads)]
        if threads > 1:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(copy, shares))
        else:
            copy(cuts)
        return rows

    def in_order(self, rows: NDArray[np.int64]) -> PackedRows:
        """The same rows in another order: int64 [rows], the number of the row that comes first, second and so on."""
        counts = np.diff(self.piece_offsets)[rows]
        ends = np.concatenate(([0], np.cumsum(counts)))
        pieces = np.arange(ends[-1]) + np.repeat(self.piece_offsets[:-1][rows] - ends[:-1], counts)
        lengths = self.lengths[pieces]
        row_offsets = np.concatenate(([0], np.cumsum(lengths)))[ends]
        return PackedRows(self.starts[pieces], lengths, row_offsets, ends, self.documents[pieces], self.dropped)

    def labels(self, flat: NDArray[np.int32]) -> NDArray[np.int32]:
        """The rows' labels: those of the documents, but for the first token of each piece, which nothing predicts."""
        return self.without_begins(self.gather(flat))

    def without_begins(self, labels: NDArray[np.int32]) -> NDArray[np.int32]:
        """Labels of the rows, changed in place: the first of each piece is ignored."""
        labels[(np.cumsum(self.lengths) - self.lengths)[self.lengths > 0]] = IGNORE_INDEX
        return labels


def pack_whole(offsets: NDArray[np.int64], max_length: int, overflow: str, strategy: str) -> PackedRows:
    """Whole documents, several to a row; what becomes of longer ones is `overflow`."""
    sizes = np.diff(offsets)
    documents = np.arange(len(sizes))
    if overflow == "split":
        parts = np.maximum(1, -(-sizes // max_length))
        documents = np.repeat(documents, parts)
        nth = np.arange(len(documents)) - np.repeat(np.cumsum(parts) - parts, parts)
        lengths = np.minimum(max_length, sizes[documents] - nth * max_length)
        starts = offsets[documents] + nth * max_length
    else:
        if overflow == "drop":
            documents = documents[sizes <= max_length]
        lengths = np.minimum(sizes[documents], max_length)
        starts = offsets[documents]
    packing = pack_lengths(lengths, max_length, strategy=strategy)
    # Rows in the order of their first document, documents of a row in their own order.
    first = np.full(packing.num_bins, len(lengths))
    np.minimum.at(first, packing.bin_of, np.arange(len(lengths)))
    rank = np.empty(packing.num_bins, np.int64)
    rank[np.argsort(first, kind="stable")] = np.arange(packing.num_bins)
    row_of = rank[packing.bin_of]
    order = _sorted(row_of, packing.num_bins)
    return _rows(
        starts[order], lengths[order], documents[order], np.bincount(row_of, minlength=packing.num_bins), sizes
    )


def pack_concat(offsets: NDArray[np.int64], max_length: int, overflow: str) -> PackedRows:
    """One stream of documents, cut every `max_length` tokens: a document may go on in the next row, nothing is lost."""
    sizes = np.diff(offsets)
    total = int(offsets[-1])
    cuts = np.unique(np.concatenate([offsets[:-1][sizes > 0], np.arange(0, total, max_length)]))
    lengths = np.diff(np.append(cuts, total))
    documents = np.searchsorted(offsets, cuts, "right") - 1
    per_row = np.bincount(cuts // max_length, minlength=-(-total // max_length)) if total else np.empty(0, np.int64)
    return _rows(cuts, lengths, documents, per_row, sizes)


#: How rows are made, by name.
ROWS: dict[str, Callable[[NDArray[np.int64], int, str], PackedRows]] = {
    "best_fit": partial(pack_whole, strategy="best_fit"),
    "first_fit": partial(pack_whole, strategy="first_fit"),
    "concat": pack_concat,
}


def pack_rows(
    offsets: ArrayLike, max_length: int, *, strategy: str = "best_fit", overflow: str = "truncate"
) -> PackedRows:
    """Pack documents that lie end to end in one flat array.

    Args:
        offsets: int64 [documents + 1]; document i is `flat[offsets[i]:offsets[i + 1]]`.
        max_length: most tokens a row may hold.
        strategy: "best_fit", "first_fit" or "concat".
        overflow: but for concat, what becomes of longer documents: "truncate", "split" into pieces, or "drop".

    Raises:
        ConfigError: an unknown strategy or overflow, or `max_length` under 2.
    """
    check_packing(max_length, strategy, overflow)
    return ROWS[strategy](np.asarray(offsets, np.int64), max_length, overflow)


def check_packing(max_length: int, strategy: str, overflow: str) -> None:
    """Raise ConfigError unless the settings name a way to pack."""
    for name, value, known in (("strategy", strategy, tuple(ROWS)), ("overflow", overflow, OVERFLOW)):
        if value not in known:
            raise ConfigError(f"{name} is {value!r}; expected one of {', '.join(known)}{nearest(str(value), known)}")
    if max_length < 2:
        raise ConfigError(f"max_length is {max_length}; expected at least 2, a token and the one that it predicts")


def _sorted(values: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """Stable order of values from 0 to `most`; sixteen bits are sorted by radix."""
    return np.argsort(values.astype(np.uint16) if most < 1 << 16 else values, kind="stable")


def _rows(
    starts: NDArray[np.int64],
    lengths: NDArray[np.int64],
    documents: NDArray[np.int64],
    pieces_per_row: NDArray[np.int64],
    sizes: NDArray[np.int64],
) -> PackedRows:
    ends = np.concatenate(([0], np.cumsum(lengths)))
    piece_offsets = np.concatenate(([0], np.cumsum(pieces_per_row))).astype(np.int64)
    kept = np.bincount(documents, lengths, len(sizes)).astype(np.int64)
    return PackedRows(starts, lengths, ends[piece_offsets].astype(np.int64), piece_offsets, documents, sizes - kept)
