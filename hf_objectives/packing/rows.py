"""Documents to rows: which piece of which document is where, and the arrays of the rows."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from hf_objectives.errors import ConfigError
from hf_objectives.packing.bins import STRATEGIES, pack_lengths, stable_order
from hf_objectives.types import IGNORE_INDEX, check_max_length, check_one_of

Ints = NDArray[np.int64]
OVERFLOW = ("truncate", "split", "drop")
_LONG = 200  # tokens of a piece from which on it is faster to copy pieces than tokens
_GATHERED = 1 << 15  # tokens that are copied at a time: what is in the cache is copied several times as fast
_CHUNKS_A_THREAD = 32  # fewer are copied before a thread has started


def pack_rows(
    offsets: ArrayLike, max_length: int, *, strategy: str = "best_fit", overflow: str = "truncate"
) -> PackedRows:
    """Pack documents that lie end to end in one flat array.

    Args:
        offsets: int64 [documents + 1]; document i is `flat[offsets[i]:offsets[i + 1]]`.
        max_length: most tokens a row may hold.
        strategy: "best_fit" or "first_fit", whole documents; or "concat", one stream.
        overflow: what happens to longer documents, but under "concat": "truncate", "split" into pieces, or "drop".

    Raises:
        ConfigError: an unknown strategy or overflow, or `max_length` under 2.
    """
    check_packing(max_length, strategy, overflow)
    offsets = np.asarray(offsets, np.int64)
    if strategy == "concat":
        return _pack_stream(offsets, max_length)
    return _pack_whole(offsets, max_length, overflow, strategy)


def document_positions(lengths: ArrayLike) -> NDArray[np.int32]:
    """The position of each token in its document, int32 [tokens], of documents of these lengths that lie end to end."""
    sizes = np.asarray(lengths, np.int64)
    ends = np.cumsum(sizes)
    return (np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - sizes, sizes)).astype(np.int32)


def check_packing(max_length: int | None, strategy: str, overflow: str = "split") -> None:
    """Raise a ConfigError where settings of packing are unknown, or `max_length` is missing or under 2."""
    check_one_of("strategy", strategy, STRATEGIES)
    check_one_of("overflow", overflow, OVERFLOW)
    if max_length is None:
        raise ConfigError("packing needs max_length, the number of tokens that a packed row holds")
    check_max_length(max_length)


def _pack_whole(offsets: Ints, max_length: int, overflow: str, strategy: str) -> PackedRows:
    """Whole documents, several to a row."""
    sizes = np.diff(offsets)
    documents = np.arange(len(sizes))
    begins = np.zeros_like(documents)  # of each piece in its document
    if overflow == "split":
        parts = np.maximum(1, -(-sizes // max_length))
        documents = np.repeat(documents, parts)
        begins = (np.arange(len(documents)) - np.repeat(np.cumsum(parts) - parts, parts)) * max_length
    elif overflow == "drop":
        documents = documents[sizes <= max_length]
        begins = begins[: len(documents)]
    lengths = np.minimum(max_length, sizes[documents] - begins)
    packing = pack_lengths(lengths, max_length, strategy=strategy)
    # Rows in the order of their first document, documents of a row in their own order.
    first = np.full(packing.num_bins, len(lengths))
    np.minimum.at(first, packing.bin_of, np.arange(len(lengths)))
    row_of = np.argsort(np.argsort(first))[packing.bin_of]
    order = stable_order(row_of, packing.num_bins)
    pieces = np.bincount(row_of, minlength=packing.num_bins)
    return _packed((offsets[documents] + begins)[order], lengths[order], documents[order], pieces, sizes)


def _pack_stream(offsets: Ints, max_length: int) -> PackedRows:
    """One stream, cut every `max_length` tokens: a document may go on in the next row, nothing is lost."""
    sizes = np.diff(offsets)
    total = int(offsets[-1])
    cuts = np.unique(np.concatenate([offsets[:-1][sizes > 0], np.arange(0, total, max_length)]))
    lengths = np.diff(np.append(cuts, total))
    documents = np.searchsorted(offsets, cuts, "right") - 1
    pieces = np.bincount(cuts // max_length, minlength=-(-total // max_length)) if total else np.empty(0, np.int64)
    return _packed(cuts, lengths, documents, pieces, sizes)


def _packed(starts: Ints, lengths: Ints, documents: Ints, pieces: Ints, sizes: Ints) -> PackedRows:
    """Rows from their pieces in order, `pieces` [rows] to a row, of documents of `sizes` tokens."""
    ends = np.concatenate(([0], np.cumsum(lengths)))
    piece_offsets = np.concatenate(([0], np.cumsum(pieces))).astype(np.int64)
    kept = np.bincount(documents, lengths, len(sizes)).astype(np.int64)
    return PackedRows(starts, lengths, ends[piece_offsets].astype(np.int64), piece_offsets, documents, sizes - kept)


@dataclass(frozen=True, slots=True)
class PackedRows:
    """Rows of packed documents, or of pieces of documents.

    Example: the documents `a b c` and `d e` in one row of five tokens have `starts` 0 and 3, `lengths` 3 and 2,
    `row_offsets` 0 and 5, `piece_offsets` 0 and 2, `documents` 0 and 1.

    Attributes:
        starts: int64 [pieces], where each piece begins in the flat input, in the order of the rows.
        lengths: int64 [pieces], tokens of each piece.
        row_offsets: int64 [rows + 1], row i has the tokens `row_offsets[i]:row_offsets[i + 1]`.
        piece_offsets: int64 [rows + 1], row i has the pieces `piece_offsets[i]:piece_offsets[i + 1]`.
        documents: int64 [pieces], the document of each piece.
        dropped: int64 [documents], tokens of each document that no row holds.
    """

    starts: Ints
    lengths: Ints
    row_offsets: Ints
    piece_offsets: Ints
    documents: Ints
    dropped: Ints

    def gather_all(self, flats: Sequence[NDArray]) -> list[NDArray]:
        """The tokens of all rows end to end, from arrays that hold the documents end to end, such as ids and labels."""
        total = int(self.lengths.sum())
        if total >= _LONG * max(1, len(self.lengths)):
            with ThreadPoolExecutor(len(flats)) as pool:
                return list(pool.map(self._gather_pieces, flats))
        return self._gather_tokens(flats, total)

    def _gather_pieces(self, flat: NDArray) -> NDArray:
        """Few long pieces: Arrow copies each as a whole, without Python in between."""
        bits = flat.view(f"u{flat.itemsize}")  # Arrow packs bools
        pieces = pa.LargeListViewArray.from_arrays(pa.array(self.starts), pa.array(self.lengths), pa.array(bits))
        joined = pieces.flatten()
        if np.may_share_memory(joined.to_numpy(), flat):  # one piece is a view, not a copy
            return joined.to_numpy().copy().view(flat.dtype)
        return np.frombuffer(joined.buffers()[1], flat.dtype, len(joined))

    def _gather_tokens(self, flats: Sequence[NDArray], total: int) -> list[NDArray]:
        """Many short pieces: copy by the index of each token."""
        rows = [np.empty(total, flat.dtype) for flat in flats]
        begins = np.cumsum(self.lengths) - self.lengths
        cuts = np.unique(np.append(np.searchsorted(begins, np.arange(0, total, _GATHERED)), len(begins)))

        def copy(bounds: Ints) -> None:
            for a, b in itertools.pairwise(bounds.tolist()):
                first, last = int(begins[a]), int(begins[b - 1] + self.lengths[b - 1])
                index = (self.starts[a:b] - begins[a:b]).repeat(self.lengths[a:b])
                index += np.arange(first, last)
                for flat, row in zip(flats, rows, strict=True):
                    flat.take(index, out=row[first:last], mode="clip")

        threads = max(1, min(pa.cpu_count(), len(cuts) // _CHUNKS_A_THREAD))
        shares = [cuts[i * len(cuts) // threads : (i + 1) * len(cuts) // threads + 1] for i in range(threads)]
        if threads == 1:  # as in a collator: starting a thread would take longer
            copy(cuts)
            return rows
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(copy, shares))
        return rows

    def in_order(self, rows: Ints) -> PackedRows:
        """The same rows in another order: int64 [rows], the number of the row that comes first, second and so on."""
        counts = np.diff(self.piece_offsets)[rows]
        ends = np.concatenate(([0], np.cumsum(counts)))
        pieces = np.arange(ends[-1]) + np.repeat(self.piece_offsets[:-1][rows] - ends[:-1], counts)
        lengths = self.lengths[pieces]
        row_offsets = np.concatenate(([0], np.cumsum(lengths)))[ends]
        return PackedRows(self.starts[pieces], lengths, row_offsets, ends, self.documents[pieces], self.dropped)

    def without_begins(self, labels: NDArray[np.int32]) -> NDArray[np.int32]:
        """Labels of all rows, changed in place: the first of each piece, which nothing predicts, is ignored."""
        labels[(np.cumsum(self.lengths) - self.lengths)[self.lengths > 0]] = IGNORE_INDEX
        return labels
