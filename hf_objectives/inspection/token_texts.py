"""Show tokens as text: each token in its context, and runs of trained tokens."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from hf_objectives.types import IGNORE_INDEX

#: Columns that mark trained tokens where a row or a batch has no labels, in order of preference.
MASKS = ("completion_mask", "assistant_masks", "loss_mask")
_WIDEST_GROUP = 8  # tokens; no character takes more, and text that never decodes must not grow without end


class Token(NamedTuple):
    """A piece of text that decodes whole, its ids (several where they share a character) and whether it is trained."""

    text: str
    ids: tuple[int, ...]
    trained: bool


class TokenTexts:
    """Decodes tokens in their context: the text of a token is what it adds to the text before it.

    Tokens that share a character have one text together. The tokenizer is one of transformers, or anything with its `decode`.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        self._added: dict[tuple[tuple[int, ...], tuple[int, ...]], str | None] = {}

    def tokens(self, ids: Iterable[int], labels: Iterable[int]) -> list[Token]:
        """Tokens whose texts join to the decoded row; `labels` are unshifted, -100 where a token is not trained."""
        listed, trained = [int(i) for i in ids], [int(label) != IGNORE_INDEX for label in labels]
        tokens: list[Token] = []
        before: tuple[int, ...] = ()
        start = 0
        for end in range(1, len(listed) + 1):
            group = tuple(listed[start:end])
            text = self._text(before, group)
            last = end == len(listed) or len(group) == _WIDEST_GROUP
            if text is None and not last:
                continue
            if text is None:
                text = self._decode(before + group)[len(self._decode(before)) :]
            if len(group) > 1 and (kept := self._kept(before, group)):
                tokens.append(Token(kept, group[:-1], any(trained[start : end - 1])))
                text, group, start = text[len(kept) :], group[-1:], end - 1
            tokens.append(Token(text, group, any(trained[start:end])))
            before, start = group, end
        return tokens

    def _text(self, before: tuple[int, ...], group: tuple[int, ...]) -> str | None:
        """What `group` adds to `before`; None while it ends within a character."""
        key = before, group
        if key not in self._added:
            alone, both = self._decode(before), self._decode(before + group)
            whole = not both.endswith("\ufffd") and both.startswith(alone) and (len(both) > len(alone) or not before)
            self._added[key] = both[len(alone) :] if whole else None
        return self._added[key]

    def _kept(self, before: tuple[int, ...], group: tuple[int, ...]) -> str:
        """What all but the last of `group` adds, if the last does not change it: then these tokens are no part of a
        character, but a replacement character in the text, or invalid bytes."""
        alone, head, both = (self._decode(before + part) for part in ((), group[:-1], group))
        return head[len(alone) :] if both.startswith(head) and len(both) > len(head) else ""

    def _decode(self, ids: tuple[int, ...]) -> str:
        if not ids:
            return ""
        if self._backend is None:
            return str(self._tokenizer.decode(list(ids)))
        return str(self._backend.decode(list(ids), skip_special_tokens=False))


def trained_runs(labels: ArrayLike) -> list[tuple[int, int]]:
    """Half-open ranges of the runs of trained tokens; `labels` [tokens] has -100 where a token is not trained."""
    trained = np.asarray(labels) != IGNORE_INDEX
    edges = np.flatnonzero(np.diff(np.concatenate(([False], trained, [False])).astype(np.int8)))
    return [(start, end) for start, end in edges.reshape(-1, 2).tolist()]


def marked_runs(tokenizer: Any, ids: Iterable[int], labels: Iterable[int]) -> list[tuple[str, bool]]:
    """Texts of the runs of trained and of untrained tokens, each with whether it is trained; they join to the decoded row.

    Decoded alone, a run may lose the space before it, and a character whose tokens two runs share. Here such a character
    is in one run, which is trained where any of its tokens is. `ids` and unshifted `labels` are [tokens] of one row.
    """
    runs = itertools.groupby(TokenTexts(tokenizer).tokens(ids, labels), key=lambda token: token.trained)
    return [("".join(token.text for token in run), trained) for trained, run in runs]
