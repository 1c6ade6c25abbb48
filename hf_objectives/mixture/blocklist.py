"""Documents that are never drawn: which rows go whole, and what is left of the others."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray


def blocked_whole(rows: Any, offsets: NDArray[np.int64], blocked: Collection[int]) -> NDArray[np.int64]:
    """Packed rows of which every document is blocked, by the numbers of the documents and where each row begins."""
    free = np.concatenate(([0], np.cumsum(~np.isin(rows, list(blocked)))))
    return np.flatnonzero(np.diff(free[offsets]) == 0)


def without(row: Mapping[str, Any], blocked: Collection[int]) -> dict[str, Any]:
    """A packed row without the documents whose numbers are blocked."""
    keep = [number not in blocked for number in row["rows"]]
    if all(keep):
        return dict(row)
    lengths = np.asarray(row["seq_lengths"])
    tokens = np.repeat(keep, lengths)
    lists = {
        name: [one for one, kept in zip(row[name], keep, strict=True) if kept]
        for name in ("rows", "sources")
        if name in row
    }
    arrays = {name: np.asarray(row[name])[tokens] for name in ("input_ids", "labels") if name in row}
    return {**row, **arrays, **lists, "seq_lengths": lengths[keep].tolist()}
