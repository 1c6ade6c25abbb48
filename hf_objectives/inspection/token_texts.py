"""Texts of tokens in their context, and runs of trained tokens as text."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any, NamedTuple

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
    """Texts of tokens in their context: what each adds to the decoded text, tokens that share a character together.

    Args:
        tokenizer: a transformers tokenizer, or anything with its `decode`.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        self._added: dict[tuple[tuple[int, ...], tuple[int, ...]], str | None] = {}

    def tokens(self, ids: Iterable[int], labels: Iterable[int]) -> list[Token]:
        """Ids and labels (unshifted, -100 where not trained) as tokens whose texts join to the decoded row."""
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
        """What all but the last of `group` adds, if the last changes nothing of it: then it was no part of a character,
        but a replacement character that the text has, or bytes that are none."""
        alone, head, both = (self._decode(before + part) for part in ((), group[:-1], group))
        return head[len(alone) :] if both.startswith(head) and len(both) > len(head) else ""

    def _decode(self, ids: tuple[int, ...]) -> str:
        if not ids:
            return ""
        if self._backend is None:
            return str(self._tokenizer.decode(list(ids)))
        return str(self._backend.decode(list(ids), skip_special_tokens=False))


def marked_runs(tokenizer: Any, ids: Iterable[int], labels: Iterable[int]) -> list[tuple[str, bool]]:
    """Texts of the runs of trained and of untrained tokens, in order; they join to the decoded row.

    A run that is decoded alone loses the space before it with some tokenizers, and a character whose tokens two runs
    share; here such a character is in one run, trained where any of its tokens is.

    Args:
        tokenizer: as of `TokenTexts`.
        ids, labels: of one row; labels unshifted, -100 where a token is not trained.
    """
    runs = itertools.groupby(TokenTexts(tokenizer).tokens(ids, labels), key=lambda token: token.trained)
    return [("".join(token.text for token in run), trained) for trained, run in runs]
