"""Frame documents: what the tokenizer puts before a text (BOS or nothing), and one EOS after it.

Example, with a tokenizer that adds BOS: the text "ab" becomes `BOS a b EOS`. BOS is not trained, EOS is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_objectives.errors import TokenizerError


@dataclass(frozen=True, slots=True)
class Frame:
    """The ids around a document: those `before` it, and `after`, the id of EOS."""

    before: list[int]
    after: int


def document_frame(tokenizer: Any) -> Frame:
    """The frame of documents under a tokenizer.

    Raises:
        TokenizerError: the tokenizer has no EOS token.
    """
    if tokenizer.eos_token_id is None:
        raise TokenizerError("the tokenizer has no EOS token; set tokenizer.eos_token, documents must end with one")
    framed, bare = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    begin = next(i for i in range(len(framed)) if framed[i : i + len(bare)] == bare)
    return Frame(list(framed[:begin]), int(tokenizer.eos_token_id))


@dataclass(frozen=True, slots=True)
class Framed:
    """Documents end to end, with the frame of each.

    Attributes:
        ids: int32 [tokens with frames].
        offsets: int64 [documents + 1], where each document begins and ends with its frame.
        own: bool [tokens with frames], False for the tokens of a frame.
        closed: bool [documents], which got an EOS.
    """

    ids: NDArray[np.int32]
    offsets: NDArray[np.int64]
    own: NDArray[np.bool_]
    closed: NDArray[np.bool_]


def frame_documents(
    ids: NDArray[np.int32], offsets: NDArray[np.int64], frame: Frame, framed: NDArray[np.bool_]
) -> Framed:
    """Put the frame around those documents that `framed` says; one that ends with EOS already gets no second one.

    Args:
        ids: int32 [tokens], the documents end to end.
        offsets: int64 [documents + 1]; document i is `ids[offsets[i]:offsets[i + 1]]`.
        framed: bool [documents].
    """
    sizes = np.diff(offsets)
    closed = framed.copy()
    closed[sizes > 0] &= ids[offsets[1:][sizes > 0] - 1] != frame.after
    made = np.concatenate(([0], np.cumsum(sizes + len(frame.before) * framed + closed)))
    fronts = made[:-1][framed][:, None] + np.arange(len(frame.before))
    own = np.ones(made[-1], bool)
    own[fronts] = own[made[1:][closed] - 1] = False
    framed_ids = np.full(made[-1], frame.after, np.int32)
    framed_ids[own], framed_ids[fronts] = ids, frame.before
    return Framed(framed_ids, made, own, closed)
