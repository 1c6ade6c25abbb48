"""Shorten preference pairs that are longer than `max_length`.

A pair loses, in this order: the oldest turns of its prompt, whole and with the leading system message kept; the beginning
of the last user's text (of a prompt in plain text, its first tokens after BOS); the ends of the answers. The prompt is
shortened until the longer answer fits, though never below half of `max_length`. The tokens of an answer before its cut
stay trained: they are what was compared, and no end of turn is taught where none was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_objectives.labels.conversation import num_leading, role_of
from hf_objectives.labels.formats import Example
from hf_objectives.labels.pair_prompt import SIDES
from hf_objectives.labels.tokenization import text_encoder

Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Pair:
    """Both sides of a preference row, encoded.

    Attributes:
        ids: int32 [tokens] of each side, prompt and answer.
        trained: bool [tokens] of each side, which tokens its answer trains.
    """

    ids: tuple[NDArray[np.int32], NDArray[np.int32]]
    trained: tuple[Mask, Mask]

    @property
    def prompt(self) -> int:
        """Tokens of the prompt: what the sides have in common, but for the first trained token of either and what follows."""
        a, b = self.ids
        size = min(len(a), len(b))
        differ = np.flatnonzero(a[:size] != b[:size])
        first = [int(mask.argmax()) if mask.any() else len(mask) for mask in self.trained]
        return min(int(differ[0]) if len(differ) else size, *first)

    @property
    def longest(self) -> int:
        """Tokens of the longer side."""
        return max(map(len, self.ids))


def prompt_limit(prompt: int, longest: int, max_length: int) -> int:
    """How many tokens a prompt may keep: what the longer answer leaves, and half of `max_length` in any case."""
    return max(max_length - (longest - prompt), max_length // 2)


def shorten_chats(
    example: Example, pair: Pair, max_length: int, encode: Callable[[Example], Pair], tokenizer: Any
) -> Pair:
    """Encode two conversations, a `pair` that is too long, without what their prompt has to lose; see the module.

    The fewest oldest turns that make the prompt fit are found by halving, with `encode` on shorter rows.
    """
    limit, n = prompt_limit(pair.prompt, pair.longest, max_length), example.prompt_turns or 0
    begin = min(num_leading(example.messages), n)
    asks = [i for i in range(begin, n) if role_of(example.messages[i]) == "user"]
    starts = [i for i in asks if i > begin]
    kept, low, high = example, 0, len(starts) - 1
    while low <= high:
        middle = (low + high) // 2
        shorter = _without(example, begin, starts[middle])
        trial = encode(shorter)
        if trial.prompt > limit and middle < len(starts) - 1:
            low = middle + 1
        else:
            pair, kept, high = trial, shorter, middle - 1
    if asks and pair.prompt > limit:
        return _shorten_question(kept, pair, asks[-1] - (n - (kept.prompt_turns or 0)), limit, encode, tokenizer)
    return pair


def _without(example: Example, begin: int, end: int) -> Example:
    """The row without a stretch of its prompt."""
    sides = [[*side[:begin], *side[end:]] for side in (example.messages, example.rejected)]
    turns = (example.prompt_turns or 0) - (end - begin)
    return replace(example, messages=sides[0], rejected=sides[1], prompt_turns=turns)


def _shorten_question(
    example: Example, pair: Pair, turn: int, limit: int, encode: Callable[[Example], Pair], tokenizer: Any
) -> Pair:
    """The pair without the beginning of one message's text, until the prompt has `limit` tokens or no text is left."""
    content: Any = example.messages[turn].get("content")
    while pair.prompt > limit:
        content = _without_beginning(tokenizer, content, pair.prompt - limit)
        if content is None:
            break
        sides = [
            [*side[:turn], {**side[turn], "content": content}, *side[turn + 1 :]]
            for side in (example.messages, example.rejected)
        ]
        pair = encode(replace(example, messages=sides[0], rejected=sides[1]))
    return pair


def _without_beginning(tokenizer: Any, content: Any, tokens: int) -> Any:
    """A message's content without its first tokens; None where nothing would be left of it."""
    texts = [content] if isinstance(content, str) else [block["text"] for block in content or ()]
    for i, text in enumerate(texts):
        encoded = text_encoder(tokenizer).encode_batch([text])
        size, last = len(encoded.ids), i == len(texts) - 1
        if tokens >= size and not last:
            tokens -= size
            continue
        if size < 2:
            return None
        begin = int(encoded.starts[min(tokens, size - 1)])
        # A token may begin inside a character; what is left begins with a whole one.
        rest = text.encode()[begin:].decode(errors="ignore") if encoded.in_bytes[0] else text[begin:]
        if not rest.strip() or rest == text:
            return None
        return rest if isinstance(content, str) else [{**content[i], "text": rest}, *content[i + 1 :]]
    return None


def shorten_texts(pair: Pair, max_length: int, num_before: int) -> Pair:
    """A pair of texts without what its prompt has to lose, after the `num_before` tokens that stand before a text (BOS)."""
    begin = min(num_before, pair.prompt)
    gone = slice(begin, begin + max(0, pair.prompt - prompt_limit(pair.prompt, pair.longest, max_length)))
    (a, b), (x, y) = pair.ids, pair.trained
    return Pair((np.delete(a, gone), np.delete(b, gone)), (np.delete(x, gone), np.delete(y, gone)))


def fit_ids(pair: Mapping[str, Any], max_length: int, *, bos: int | None) -> dict[str, Any]:
    """Cut an encoded pair, arrays with the keys of `encode_pair`, to `max_length`, with BOS kept; see the module."""
    prompt = pair["prompt_ids"]
    longest = len(prompt) + max(len(pair[f"{side}_ids"]) for side in SIDES)
    if longest > max_length:
        begin = int(len(prompt) > 0 and prompt[0] == bos)
        limit = max(prompt_limit(len(prompt), longest, max_length), begin)
        prompt = np.delete(prompt, slice(begin, begin + max(0, len(prompt) - limit)))
    left = max_length - len(prompt)
    answers = {f"{side}_{kind}": pair[f"{side}_{kind}"][:left] for side in SIDES for kind in ("ids", "mask")}
    return {"prompt_ids": prompt, **answers}
