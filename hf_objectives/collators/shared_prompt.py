"""A padded batch of preference pairs as short rows in which both answers of a pair share the tokens that they begin with."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hf_objectives.errors import FormatError
from hf_objectives.packing import pack_lengths

Ints = NDArray[np.int64]

#: Attention through a dense mask costs rows x length², all else rows x length. At this length both cost the same.
BALANCE = 3072


@dataclass(frozen=True, slots=True)
class SharedRows:
    """Pairs in rows. A pair is the tokens that both sides begin with, then the rest of the chosen side, then of the rejected.

    Attributes:
        input_ids: int64 [rows, length], 0 where a row is not full.
        position_ids: int64 [rows, length], the position of each token in its own sequence: those of the rejected side begin
            again where the common beginning ends. 0 where a row is not full.
        pairs: int64 [rows, length], the pair that a token belongs to; -1 where a row is not full.
        branches: int64 [rows, length], 0 for the common beginning, 1 for the chosen side, 2 for the rejected one.
        places: int64 [2 * pairs, width], where each token of the padded batch is in the rows laid end to end; -1 for padding.
            Tokens of a common beginning have one place for both sides.
    """

    input_ids: Ints
    position_ids: Ints
    pairs: Ints
    branches: Ints
    places: Ints


def share_prompts(input_ids: Ints, attention_mask: Ints, *, share: bool = True) -> SharedRows:
    """Lay a padded batch of pairs out as rows, each pair whole in one row.

    The rows are as short as the longest pair, or longer where that saves more padding than it costs in attention: a
    dense mask costs the square of a row's length.

    Args:
        input_ids: int64 [2 * pairs, width], the chosen sides of all pairs, then the rejected ones, padded on the right.
        attention_mask: int64 [2 * pairs, width], 1 at tokens.
        share: False for one row of all sequences end to end, without padding and each with all of its tokens. Attention that
            knows only where sequences begin needs this. `pairs` then numbers the sequences, and `branches` is 0.

    Raises:
        FormatError: an odd number of sequences, or padding that is not on the right.

    Example:
        >>> import numpy as np
        >>> rows = share_prompts(np.array([[5, 6, 7, 0], [5, 6, 8, 9]]), np.array([[1, 1, 1, 0], [1, 1, 1, 1]]))
        >>> rows.input_ids.tolist(), rows.position_ids.tolist(), rows.places.tolist()
        ([[5, 6, 7, 8, 9]], [[0, 1, 2, 2, 3]], [[0, 1, 2, -1], [0, 1, 3, 4]])
    """
    count, width = input_ids.shape
    lengths, at = attention_mask.sum(axis=1), np.arange(width)
    if count % 2:
        raise FormatError(
            f"a batch has {count} sequences; expected the chosen sides of all pairs, then the rejected ones"
        )
    if not np.array_equal(attention_mask != 0, at < lengths[:, None]):
        raise FormatError("a batch of pairs is padded on the left or within; expected padding on the right alone")
    if share:
        same = (input_ids[: count // 2] == input_ids[count // 2 :]) & (attention_mask.reshape(2, -1, width).all(axis=0))
        shared = same.cumprod(axis=1).sum(axis=1)
        sizes = lengths.reshape(2, -1).sum(axis=0) - shared
        length, starts = _starts(sizes)
        moved = (lengths[: count // 2] - shared)[:, None] * (at >= shared[:, None])  # past the rest of the chosen side
        places = np.concatenate([starts[:, None] + at, starts[:, None] + at + moved])
        branches = np.concatenate([side * (at >= shared[:, None]) for side in (1, 2)])
    else:
        length, starts = int(lengths.sum()), lengths.cumsum() - lengths
        sizes, places, branches = lengths, starts[:, None] + at, np.zeros(input_ids.shape, np.int64)
    real = at < lengths[:, None]
    pairs = np.broadcast_to((np.arange(count) % len(sizes))[:, None], input_ids.shape)
    total = -(-int((starts + sizes).max(initial=1)) // length) * length

    def laid(values: Ints, empty: int) -> Ints:
        row = np.full(total, empty, np.int64)
        row[places[real]] = values[real]
        return row.reshape(-1, length)

    return SharedRows(
        input_ids=laid(input_ids, 0),
        position_ids=laid(np.broadcast_to(at, input_ids.shape), 0),
        pairs=laid(pairs, -1),
        branches=laid(branches, 0),
        places=np.where(real, places, -1),
    )


def _starts(sizes: Ints) -> tuple[int, Ints]:
    """The length of the rows that cost least, and where each pair begins in the rows laid end to end."""
    longest, total = int(sizes.max(initial=1)), int(sizes.sum())
    best: tuple[float, int, Ints] | None = None
    for capacity in sorted({min(max(total, 1), int(longest * share)) for share in (1, 1.25, 1.5, 2, 3, 4)}):
        row_of = pack_lengths(sizes, capacity).bin_of
        order = np.argsort(row_of, kind="stable")
        ends = sizes[order].cumsum()
        before = np.searchsorted(row_of[order], row_of[order])  # the first pair of the same row
        offsets = np.empty(len(sizes), np.int64)
        offsets[order] = ends - sizes[order] - (ends[before] - sizes[order][before])
        length, rows = int((offsets + sizes).max(initial=1)), int(row_of.max(initial=0)) + 1
        cost = rows * length * (1 + length / BALANCE)
        if best is None or cost < best[0]:
            best = cost, length, row_of * length + offsets
    assert best is not None
    return best[1:]
