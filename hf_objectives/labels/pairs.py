"""Preference rows to token ids: one prompt and two answers, with a mask of what the model has to produce.

Each side is rendered and tokenised once, whole, by the machinery of fine-tuning, so that `prompt_ids + chosen_ids` are the
ids that fine-tuning on the same row has, under any chat template. Where the prompt ends is read off the ids.

A pair that is too long loses, in this order: the oldest turns of its prompt, whole and with the leading system message
kept; the beginning of the last user's text (of a prompt in plain text, its first tokens after BOS); the ends of the
answers. The prompt gives way until the longer answer fits, though never below half of `max_length`. The tokens of an
answer before its cut stay trained: they are what was compared, and no end of turn is taught where none was.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_objectives.errors import ConfigError, DataError, FormatError, NothingSupervisedError, nearest
from hf_objectives.labels.chat import TRAIN_ON, ChatEncoder, Labelled, chat_encoder
from hf_objectives.labels.formats import Example, detect_format, to_example
from hf_objectives.labels.messages import read_messages
from hf_objectives.labels.pair_prompt import LEADING, SIDES, common_turns, role_of, show
from hf_objectives.labels.rows import EncodingConfig, RowEncoder
from hf_objectives.labels.spans import Rendered
from hf_objectives.labels.tokenization import text_encoder
from hf_objectives.types import IGNORE_INDEX, Row

Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class _Pair:
    """Both sides encoded: the ids of each as a whole, and which of them its answer trains."""

    ids: tuple[NDArray[np.int32], NDArray[np.int32]]
    trained: tuple[Mask, Mask]

    @property
    def prompt(self) -> int:
        """Where the answers begin: after what the sides have in common, and not beyond a trained token of either."""
        a, b = self.ids
        size = min(len(a), len(b))
        differ = np.flatnonzero(a[:size] != b[:size])
        first = [int(mask.argmax()) if mask.any() else len(mask) for mask in self.trained]
        return min(int(differ[0]) if len(differ) else size, *first)

    @property
    def longest(self) -> int:
        """Tokens of the longer side."""
        return max(map(len, self.ids))


def encode_pair(
    tokenizer: Any,
    row: Row,
    *,
    max_length: int | None = None,
    train_on: str = "assistant",
    control_tokens: str = "plain",
    chat_template: str | None = None,
    source: str | None = None,
    row_index: int | None = None,
    **template_kwargs: Any,
) -> dict[str, list[int]]:
    """Ids and masks of one preference row.

    Args:
        tokenizer: a fast transformers tokenizer.
        row: `chosen` and `rejected`, with or without `prompt` (or `conversations`), as conversations or as plain text; see
            `formats.py`. Without a prompt, it is what the two conversations begin with, message by message, or the two
            texts, letter by letter.
        max_length: tokens that prompt and answer may have together; see the module for what goes first.
        train_on: "assistant": every assistant turn of the answers; "last_assistant": the last one; "all": every token
            after the prompt, which is the mask of TRL's own collator. Turns of the prompt are never trained.
        control_tokens, chat_template, template_kwargs: see `encode_chat`.
        source, row_index: for errors.

    Returns:
        `prompt_ids`, `chosen_ids`, `rejected_ids`, lists of int: `prompt_ids + chosen_ids` is the chosen conversation, or
        the text framed by BOS and EOS. `chosen_mask`, `rejected_mask`, lists of 0 and 1 of the answers' lengths: 1 where the
        model has to produce the token.

    Raises:
        DataError: a side is missing or empty, the two are the same, or their prompts differ; no room is left for an answer
            within `max_length`; the row cannot be read or rendered. Names source and row.
        ConfigError: an unknown setting, or `max_length` under 2.

    Example:
        >>> from hf_objectives import demo
        >>> from hf_objectives.preferences import encode_pair
        >>> pair = encode_pair(demo.build_tokenizer(), demo.preferences(1)[0])
        >>> sorted(pair)
        ['chosen_ids', 'chosen_mask', 'prompt_ids', 'rejected_ids', 'rejected_mask']
    """
    if max_length is not None and max_length < 2:
        raise ConfigError(
            f"max_length is {max_length}; expected at least 2, a token of the prompt and one of the answer"
        )
    if train_on not in TRAIN_ON:
        raise ConfigError(
            f"train_on is {train_on!r}; expected one of {', '.join(TRAIN_ON)}{nearest(train_on, TRAIN_ON)}"
        )
    try:
        example = _read(row)
        if example.is_plain:
            settings = EncodingConfig(train_on="assistant", control_tokens=control_tokens)
            pair = _encode_texts(RowEncoder(tokenizer, settings), example, max_length)
        else:
            encoder = chat_encoder(
                tokenizer,
                chat_template=chat_template,
                train_on="assistant" if train_on == "all" else train_on,
                control_tokens=control_tokens,
                template_kwargs={**template_kwargs, **example.template_kwargs},
            )
            pair = _encode_chats(encoder, example, max_length)
        return _finish(pair, max_length, train_on)
    except DataError as error:
        raise error.at(source=source, row=row_index) from None


# -- reading -----------------------------------------------------------------------------------------------------------


def _read(row: Row) -> Example:
    """The row, once it is known to hold two different answers to one prompt."""
    if isinstance(row, Mapping):
        missing = [name for name in SIDES if row.get(name) is None]
        if missing:
            raise FormatError(f"{' and '.join(missing)} is missing; a preference row has both chosen and rejected")
    if (format := detect_format(row)) != "preference":
        raise FormatError(f"a row in {format} format; expected chosen and rejected, and their prompt or none")
    example = to_example(row, format=format)
    if example.rejected_text is not None:
        texts = example.text, example.rejected_text
        for name, text in zip(SIDES, texts, strict=True):
            if not text[example.prompt_chars :].strip():
                raise FormatError(f"{name} is empty; expected an answer")
        if texts[0] == texts[1]:
            raise FormatError(f"chosen and rejected are equal, {texts[0]!r:.60}; a pair compares two answers")
        return example
    n = _shared(example) if example.prompt_turns is None else example.prompt_turns
    _check_answers(example, n)
    return replace(example, prompt_turns=n)


def _shared(example: Example) -> int:
    """How many messages the two conversations begin with, where these are the prompt."""
    sides = example.messages, example.rejected
    n = common_turns(*sides)
    if all(len(side) > n for side in sides) and all(role_of(turn) in LEADING for turn in example.messages[:n]):
        asks = [side[n] for side in sides]
        if any(role_of(turn) != "assistant" for turn in asks):
            raise FormatError(
                f"prompts differ: chosen asks with {show(asks[0])} and rejected with {show(asks[1])}; "
                "expected two answers to one prompt"
            )
    return n


def _check_answers(example: Example, n: int) -> None:
    sides = example.messages, example.rejected
    if len(sides[0]) == len(sides[1]) == common_turns(*sides):
        what = show(sides[0][-1]) if sides[0] else "no message"
        raise FormatError(f"chosen and rejected are equal, {what}; a pair compares two answers")
    for name, side in zip(SIDES, sides, strict=True):
        if len(side) <= n:
            raise FormatError(f"{name} is empty, no message after the prompt; expected an answer")
        if not any(role_of(turn) == "assistant" for turn in side[n:]):
            raise NothingSupervisedError(f"{name} has no assistant message after the prompt; nothing would be compared")


# -- conversations -----------------------------------------------------------------------------------------------------


def _encode_chats(encoder: ChatEncoder, example: Example, max_length: int | None) -> _Pair:
    """Both conversations encoded, without what of the prompt has to go; see the module."""
    n = example.prompt_turns or 0
    pair = _rendered(encoder, example)
    if max_length is None or pair.longest <= max_length:
        return pair
    room = _room(pair.prompt, pair.longest, max_length)
    begin = next((i for i, turn in enumerate(example.messages[:n]) if role_of(turn) not in LEADING), n)
    asks = [i for i in range(begin, n) if role_of(example.messages[i]) == "user"]
    # The fewest oldest turns whose loss makes the prompt fit, by halving; all but the last question's where none does.
    starts = [i for i in asks if i > begin]
    low, high = 0, len(starts) - 1
    while low <= high:
        middle = (low + high) // 2
        shorter = _without(example, begin, starts[middle])
        trial = _rendered(encoder, shorter)
        if trial.prompt > room and middle < len(starts) - 1:
            low = middle + 1
            continue
        pair, kept, high = trial, shorter, middle - 1
    if starts:
        example = kept
    if asks and pair.prompt > room:
        return _with_less_asked(encoder, example, pair, asks[-1] - (n - (example.prompt_turns or 0)), room)
    return pair


def _with_less_asked(encoder: ChatEncoder, example: Example, pair: _Pair, turn: int, room: int) -> _Pair:
    """The pair without the beginning of one message's text, until the prompt has `room` tokens or no text is left."""
    content: Any = example.messages[turn].get("content")
    while pair.prompt > room:
        content = _less(encoder.tokenizer, content, pair.prompt - room)
        if content is None:
            break
        sides = [[*side[:turn], {**side[turn], "content": content}, *side[turn + 1 :]] for side in _sides(example)]
        pair = _rendered(encoder, replace(example, messages=sides[0], rejected=sides[1]))
    return pair


def _less(tokenizer: Any, content: Any, tokens: int) -> Any:
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
        at = int(encoded.starts[min(tokens, size - 1)])
        # A token may begin inside a character; what is left begins with a whole one.
        rest = text.encode()[at:].decode(errors="ignore") if encoded.in_bytes[0] else text[at:]
        if not rest.strip() or rest == text:
            return None
        return rest if isinstance(content, str) else [{**content[i], "text": rest}, *content[i + 1 :]]
    return None


def _without(example: Example, begin: int, end: int) -> Example:
    """The row without a stretch of its prompt."""
    sides = [[*side[:begin], *side[end:]] for side in _sides(example)]
    turns = (example.prompt_turns or 0) - (end - begin)
    return replace(example, messages=sides[0], rejected=sides[1], prompt_turns=turns)


def _sides(example: Example) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    return example.messages, example.rejected


def _rendered(encoder: ChatEncoder, example: Example) -> _Pair:
    """Both conversations as ids, with what their answers train."""
    rendered = []
    for name, side in zip(SIDES, _sides(example), strict=True):
        try:
            rendered.append(_render(encoder, side, example))
        except DataError as error:
            error.reason = f"{name}: {error.reason}"
            raise
    labelled = encoder.encode(rendered)
    return _pair_of(labelled)


def _render(encoder: ChatEncoder, side: list[dict[str, Any]], example: Example) -> Rendered:
    """One conversation, rendered as fine-tuning on it would, with the spans of its answer alone."""
    trained = read_messages(side, train_on=encoder.train_on).trained
    whole = encoder.render(side, example.tools)
    spans = [span for span, turn in zip(whole.spans, trained, strict=True) if turn >= (example.prompt_turns or 0)]
    return Rendered(whole.text, spans)


# -- plain text --------------------------------------------------------------------------------------------------------


def _encode_texts(encoder: RowEncoder, example: Example, max_length: int | None) -> _Pair:
    """Both texts encoded, without what of the prompt has to go: its first tokens after BOS."""
    other = replace(example, text=example.rejected_text or "")
    pair = _pair_of(encoder.encode_texts([example, other]))
    if max_length is None or pair.longest <= max_length:
        return pair
    begin = min(len(encoder.frame[0]), pair.prompt)
    end = max(begin, begin + pair.prompt - _room(pair.prompt, pair.longest, max_length))
    gone = slice(begin, end)
    (a, b), (x, y) = pair.ids, pair.trained
    return _Pair((np.delete(a, gone), np.delete(b, gone)), (np.delete(x, gone), np.delete(y, gone)))


# -- what both share ---------------------------------------------------------------------------------------------------


def _pair_of(labelled: Labelled) -> _Pair:
    ids = np.split(labelled.ids, labelled.offsets[1:-1])
    labels = np.split(labelled.labels, labelled.offsets[1:-1])
    return _Pair((ids[0], ids[1]), (labels[0] != IGNORE_INDEX, labels[1] != IGNORE_INDEX))


def _room(prompt: int, longest: int, max_length: int) -> int:
    """How many tokens the prompt may keep: what the longer answer leaves, and half of `max_length` in any case."""
    return max(max_length - (longest - prompt), max_length // 2)


def fit_ids(pair: Mapping[str, Any], max_length: int, *, bos: int | None) -> dict[str, Any]:
    """An encoded pair (arrays) cut to `max_length`: the prompt's first tokens after BOS go first, see the module."""
    prompt = pair["prompt_ids"]
    longest = len(prompt) + max(len(pair[f"{side}_ids"]) for side in SIDES)
    if longest > max_length:
        begin = int(len(prompt) > 0 and prompt[0] == bos)
        room = max(_room(len(prompt), longest, max_length), begin)
        prompt = np.delete(prompt, slice(begin, begin + max(0, len(prompt) - room)))
    left = max_length - len(prompt)
    answers = {f"{side}_{kind}": pair[f"{side}_{kind}"][:left] for side in SIDES for kind in ("ids", "mask")}
    return {"prompt_ids": prompt, **answers}


def _finish(pair: _Pair, max_length: int | None, train_on: str) -> dict[str, list[int]]:
    """The pair as lists, its answers cut to what is left for them.

    Raises:
        NothingSupervisedError: nothing of an answer would be trained.
        FormatError: no token tells the sides apart.
    """
    at, limit = pair.prompt, max_length or pair.longest
    if at >= limit:
        raise NothingSupervisedError(
            f"the prompt takes {at} tokens where max_length={max_length} and cannot be shortened further, so that no room "
            "is left for an answer; raise max_length, or shorten its system message and what follows its last question"
        )
    made: dict[str, list[int]] = {"prompt_ids": pair.ids[0][:at].tolist()}
    for name, ids, trained in zip(SIDES, pair.ids, pair.trained, strict=True):
        mask = np.ones(len(ids), bool) if train_on == "all" else trained.copy()
        mask[:1] = False  # nothing predicts the first token of all
        if not mask[at:limit].any():
            where = "" if len(ids) <= limit else f" within max_length={max_length}, of which the prompt takes {at}"
            raise NothingSupervisedError(f"{name} has no token to train{where}; expected an answer")
        made[f"{name}_ids"], made[f"{name}_mask"] = ids[at:limit].tolist(), mask[at:limit].astype(int).tolist()
    if made["chosen_ids"] == made["rejected_ids"] and made["chosen_mask"] == made["rejected_mask"]:
        n, uncut = len(made["chosen_ids"]), pair.longest <= limit
        raise FormatError(
            "chosen and rejected differ, but the template renders them alike; a pair compares two answers"
            if uncut
            else f"chosen and rejected have the same first {n} tokens, and max_length={max_length} leaves no more of them; "
            "raise max_length"
        )
    return made
