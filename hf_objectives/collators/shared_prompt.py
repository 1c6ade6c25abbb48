"""A padded batch of preference pairs as short rows in which both answers of a pair share the tokens that they begin with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_objectives.errors import FormatError
from hf_objectives.packing import pack_lengths

Ints = NDArray[np.int64]

#: Attention through a dense mask costs rows x length², all else rows x length. At this length both cost the same.
BALANCE = 3072


@dataclass(frozen=True, slots=True)
class SharedRows:
    """Pairs in rows. A pair is one piece: the tokens that both sides begin with, then the rest of the chosen side, then the
    rest of the rejected one. Or it is two pieces, one a side, where its beginning is not worth a mask over both.

    Attributes:
        input_ids: int64 [rows, length], 0 where a row is not full.
        position_ids: int64 [rows, length], the position of each token in its own sequence: those of the rejected side go on
            where the common beginning ends. 0 where a row is not full.
        pieces: int64 [rows, length], the piece that a token belongs to; -1 where a row is not full.
        branches: int64 [rows, length], 0 for a common beginning and for pieces of one side, 1 for the rest of the chosen
            side, 2 for the rest of the rejected one.
        places: int64 [2 * pairs, width], where each token of the padded batch is in the rows laid end to end; -1 for padding.
            Tokens of a common beginning have one place for both sides.
    """

    input_ids: Ints
    position_ids: Ints
    pieces: Ints
    branches: Ints
    places: Ints


def share_prompts(input_ids: Ints, attention_mask: Ints, *, share: bool = True) -> SharedRows:
    """Lay a padded batch of pairs out as rows, each piece whole in one row.

    The rows are as short as the longest piece, or longer where that saves more padding than it costs in attention: a dense
    mask costs the square of a row's length.

    Args:
        input_ids: int64 [2 * pairs, width], the chosen sides of all pairs, then the rejected ones, padded on the right.
        attention_mask: int64 [2 * pairs, width], 1 at tokens.
        share: False for one row of all sequences end to end, each with all of its tokens. Attention that knows only where
            sequences begin needs this.

    Raises:
        FormatError: an odd number of sequences, or padding that is not on the right.

    Example:
        >>> import numpy as np
        >>> rows = share_prompts(np.array([[5, 6, 7, 0], [5, 6, 8, 9]]), np.array([[1, 1, 1, 0], [1, 1, 1, 1]]))
        >>> rows.input_ids.tolist(), rows.position_ids.tolist(), rows.places.tolist()
        ([[5, 6, 7, 8, 9]], [[0, 1, 2, 2, 3]], [[0, 1, 2, -1], [0, 1, 3, 4]])
    """
    (count, width), half = input_ids.shape, len(input_ids) // 2
    lengths, at = attention_mask.sum(axis=1), np.arange(width)
    real = at < lengths[:, None]
    if count % 2:
        raise FormatError(f"a batch has {count} sequences; expected chosen sides of all pairs, then the rejected ones")
    if not np.array_equal(attention_mask != 0, real):
        raise FormatError("a batch of pairs is padded on the left or within; expected padding on the right alone")
    chosen, rejected = lengths[:half], lengths[half:]
    shared = ((input_ids[:half] == input_ids[half:]) & real[:half] & real[half:]).cumprod(axis=1).sum(axis=1)
    whole = chosen + rejected - shared
    together = share & (_cost(whole) < _cost(chosen) + _cost(rejected))
    sizes = np.concatenate([np.where(together, whole, chosen), np.where(together, 0, rejected)])
    length, starts = _starts(sizes) if share else (int(sizes.sum()), sizes.cumsum() - sizes)
    own = (at >= shared[:, None]) & together[:, None]  # what one side of a whole pair has alone
    begins = np.where(together, starts[:half], starts[half:])[:, None] + (chosen - shared)[:, None] * own
    places = np.concatenate([starts[:half, None] + at, begins + at])
    pieces = np.arange(count) - np.append(np.zeros(half, np.int64), half * together)
    total = -(-int((starts + sizes).max(initial=1)) // length) * length

    def laid(values: Ints, empty: int) -> Ints:
        row = np.full(total, empty, np.int64)
        row[places[real]] = values[real]
        return row.reshape(-1, length)

    return SharedRows(
        input_ids=laid(input_ids, 0),
        position_ids=laid(np.broadcast_to(at, input_ids.shape), 0),
        pieces=laid(np.broadcast_to(pieces[:, None], input_ids.shape), -1),
        branches=laid(np.concatenate([1 * own, 2 * own]), 0),
        places=np.where(real, places, -1),
    )


def _cost(length: Any) -> Any:
    """What a row of this length costs, in tokens."""
    return length * (1 + length / BALANCE)


def _starts(sizes: Ints) -> tuple[int, Ints]:
    """The length of the rows that cost least, and where each piece begins in the rows laid end to end."""
    longest, total = int(sizes.max(initial=1)), int(sizes.sum())
    best: tuple[float, int, Ints] | None = None
    # Rows as short as can be, and few rows with as little padding as can be: best fit is better with a little room.
    capacities = {max(longest, int(room * total / rows)) for rows in range(1, 9) for room in (1.02, 1.08)}
    for capacity in sorted(capacities | {longest, longest * 3 // 2}):
        row_of = pack_lengths(sizes, capacity).bin_of
        order = np.argsort(row_of, kind="stable")
        begins = sizes[order].cumsum() - sizes[order]
        offsets = np.empty(len(sizes), np.int64)
        offsets[order] = begins - begins[np.searchsorted(row_of[order], row_of[order])]  # less the row's first piece
        length = int((offsets + sizes).max(initial=1))
        starts = np.where(sizes > 0, row_of * length + offsets, 0)  # an empty piece may have a row of its own
        cost = float(_cost(length)) * (1 + int(starts.max(initial=0)) // length)
        if best is None or cost < best[0]:
            best = cost, length, starts
    assert best is not None
    return best[1:]
