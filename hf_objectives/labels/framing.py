"""Frame documents: BOS before each, where the tokenizer adds one, and one EOS after it.

Example, with a tokenizer that adds BOS: the text "ab" becomes `BOS a b EOS`. BOS is not trained, EOS is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hf_objectives.errors import TokenizerError


@dataclass(frozen=True, slots=True)
class Frame:
    """The ids around a document.

    Attributes:
        before: what the tokenizer puts before a text, BOS or nothing.
        after: id of EOS.
    """

    before: list[int]
    after: int


def document_frame(tokenizer: Any) -> Frame:
    """The frame of documents under a tokenizer.

    Raises:
        TokenizerError: the tokenizer has no EOS token.
    """
    if tokenizer.eos_token_id is None:
        raise TokenizerError("the tokenizer has no EOS token; set tokenizer.eos_token, documents must end with one")
    framed = tokenizer("a")["input_ids"]
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    begin = next(i for i in range(len(framed)) if framed[i : i + len(bare)] == bare)
    return Frame(list(framed[:begin]), int(tokenizer.eos_token_id))


@dataclass(frozen=True, slots=True)
class Room:
    """Documents end to end, with room made around each; see `make_room`.

    Attributes:
        offsets: int64 [documents + 1], where each document begins and ends with its room.
        before, after: int64, the positions before the documents, in order, and after them.
        text: bool [tokens with room], the positions of the documents' own tokens.
    """

    offsets: NDArray[np.int64]
    before: NDArray[np.int64]
    after: NDArray[np.int64]
    text: NDArray[np.bool_]

    def fill(self, values: NDArray[np.int32], before: ArrayLike, after: int) -> NDArray[np.int32]:
        """Values of the documents' tokens, int32 [tokens], with `before` and `after` in the room around each document."""
        made = np.empty(len(self.text), np.int32)
        made[self.text] = values
        made[self.before] = np.resize(before, len(self.before))
        made[self.after] = after
        return made


def make_room(offsets: NDArray[np.int64], before: NDArray[np.int64], after: NDArray[np.bool_]) -> Room:
    """Make room for `before[i]` tokens before document i and, where `after[i]`, for one token after it.

    The room is found by position. `np.insert` would not do: where one document ends the next begins, so that a position
    does not say which of the two an insertion belongs to.
    """
    sizes = np.diff(offsets)
    made = np.concatenate(([0], np.cumsum(sizes + before + after)))
    begins = np.cumsum(before) - before
    fronts = np.repeat(made[:-1] - begins, before) + np.arange(int(before.sum()))
    backs = made[1:][after] - 1
    text = np.ones(int(made[-1]), bool)
    text[fronts] = text[backs] = False
    return Room(made, fronts, backs, text)


def frame_documents(
    ids: NDArray[np.int32], offsets: NDArray[np.int64], frame: Frame, framed: NDArray[np.bool_]
) -> tuple[Room, NDArray[np.bool_]]:
    """Make room for the frame of each document that `framed` says, bool [documents].

    Returns:
        The room, and bool [documents]: which documents get an EOS. One that ends with EOS already gets no second one.
    """
    ended = np.zeros(len(framed), bool)
    filled = np.diff(offsets) > 0
    ended[filled] = ids[offsets[1:][filled] - 1] == frame.after
    closed = framed & ~ended
    return make_room(offsets, len(frame.before) * framed, closed), closed
