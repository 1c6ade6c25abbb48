"""Room around documents that lie end to end: which place is the begin of which document, and which the end."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Room:
    """Documents end to end with room made around each, see `make_room`.

    Attributes:
        offsets: int64 [documents + 1], where each document begins and ends with its room.
        before, after: int64, places of what comes before the documents, in order, and after them.
        text: bool [tokens with room], the places of the documents' own tokens.
    """

    offsets: NDArray[np.int64]
    before: NDArray[np.int64]
    after: NDArray[np.int64]
    text: NDArray[np.bool_]


def make_room(offsets: NDArray[np.int64], before: NDArray[np.int64], after: NDArray[np.bool_]) -> Room:
    """Room for `before[i]` tokens before document i and, where `after[i]`, for one after it.

    By place and not by insertion: where one document ends the next begins, and an insertion there does not say whose.
    """
    sizes = np.diff(offsets)
    made = np.concatenate(([0], np.cumsum(sizes + before + after)))
    begins = np.cumsum(before) - before
    fronts = np.repeat(made[:-1] - begins, before) + np.arange(int(before.sum()))
    backs = made[1:][after] - 1
    text = np.ones(int(made[-1]), bool)
    text[fronts] = text[backs] = False
    return Room(made, fronts, backs, text)
