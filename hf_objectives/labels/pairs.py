"""Encode preference rows: one prompt and two answers, with a mask of the tokens that the model has to produce.

Each side is rendered and tokenised once, as a whole, as fine-tuning does. So `prompt_ids + chosen_ids` are the ids that
fine-tuning on the chosen conversation has, under any chat template. The ids tell where the prompt ends.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from hf_objectives.errors import DataError, FormatError, NothingSupervisedError
from hf_objectives.labels.chat import ChatEncoder, Labelled, chat_encoder
from hf_objectives.labels.config import LabelConfig
from hf_objectives.labels.conversation import common_turns, num_leading, role_of, show
from hf_objectives.labels.formats import Example, detect_format, to_example
from hf_objectives.labels.messages import read_messages
from hf_objectives.labels.pair_limits import Pair, shorten_chats, shorten_texts
from hf_objectives.labels.pair_prompt import SIDES
from hf_objectives.labels.pieces import PieceEncoder
from hf_objectives.labels.spans import Rendered
from hf_objectives.types import IGNORE_INDEX, Row


def encode_pair(
    tokenizer: Any, row: Row, *, source: str | None = None, row_index: int | None = None, **options: Any
) -> dict[str, list[int]]:
    """Ids and masks of one preference row.

    Args:
        tokenizer: a fast transformers tokenizer.
        row: `chosen` and `rejected`, with or without `prompt` (or `conversations`), as conversations or as plain text; see
            `formats.py`. Without a prompt, it is what the two conversations begin with, message by message, or the two
            texts, letter by letter.
        source, row_index: name and number of the row, for errors.
        options: `max_length`, tokens that prompt and one answer may have together, see `pair_limits.py` for what is cut
            first. `train_on`: "assistant" trains every assistant turn of the answers, "last_assistant" the last one,
            "all" every token after the prompt, which is the mask of TRL's own collator; turns of the prompt are never
            trained. `control_tokens`, `chat_template` and `template_kwargs`, see `LabelConfig`; every other keyword is a
            variable of the chat template.

    Returns:
        `prompt_ids`, `chosen_ids`, `rejected_ids`, lists of int: `prompt_ids + chosen_ids` is the chosen conversation, or
        the text between BOS and EOS. `chosen_mask`, `rejected_mask`, lists of 0 and 1 of the answers' lengths: 1 where the
        model has to produce the token.

    Raises:
        DataError: a side is missing or empty, the two are equal, or their prompts differ; no room is left for an answer
            within `max_length`; the row cannot be read or rendered. Names source and row.
        ConfigError: an unknown option, or `max_length` under 2.

    Example:
        >>> from hf_objectives import demo
        >>> from hf_objectives.labels import encode_pair
        >>> pair = encode_pair(demo.build_tokenizer(), demo.preferences(1)[0])
        >>> sorted(pair)
        ['chosen_ids', 'chosen_mask', 'prompt_ids', 'rejected_ids', 'rejected_mask']
    """
    config = LabelConfig.from_keywords(options)
    try:
        example = read_pair(row)
        encode = _encode_texts if example.is_plain else _encode_chats
        return _finish(encode(tokenizer, example, config), config)
    except DataError as error:
        raise error.at(source=source, row=row_index) from None


# -- reading -----------------------------------------------------------------------------------------------------------


def read_pair(row: Row) -> Example:
    """Read a row and check that it holds two different answers to one prompt; `prompt_turns` is set."""
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
    if example.prompt_turns is None:
        example = replace(example, prompt_turns=_shared_turns(example))
    _check_answers(example)
    return example


def _shared_turns(example: Example) -> int:
    """How many messages the two conversations begin with; these are the prompt."""
    sides = example.messages, example.rejected
    n = common_turns(*sides)
    if all(len(side) > n for side in sides) and num_leading(example.messages[:n]) == n:
        asks = [side[n] for side in sides]
        if any(role_of(turn) != "assistant" for turn in asks):
            raise FormatError(
                f"prompts differ: chosen asks with {show(asks[0])} and rejected with {show(asks[1])}; "
                "expected two answers to one prompt"
            )
    return n


def _check_answers(example: Example) -> None:
    sides = example.messages, example.rejected
    if len(sides[0]) == len(sides[1]) == common_turns(*sides):
        what = show(sides[0][-1]) if sides[0] else "no message"
        raise FormatError(f"chosen and rejected are equal, {what}; a pair compares two answers")
    for name, side in zip(SIDES, sides, strict=True):
        answer = side[example.prompt_turns :]
        if not answer:
            raise FormatError(f"{name} is empty, no message after the prompt; expected an answer")
        if not any(role_of(turn) == "assistant" for turn in answer):
            raise NothingSupervisedError(f"{name} has no assistant message after the prompt; nothing would be compared")


# -- encoding ----------------------------------------------------------------------------------------------------------


def _encode_texts(tokenizer: Any, example: Example, config: LabelConfig) -> Pair:
    encoder = PieceEncoder(tokenizer, LabelConfig(control_tokens=config.control_tokens))
    pair = _pair(encoder.encode_texts([example, replace(example, text=example.rejected_text or "")]))
    if config.max_length is None or pair.longest <= config.max_length:
        return pair
    return shorten_texts(pair, config.max_length, len(encoder.document_frame.before))


def _encode_chats(tokenizer: Any, example: Example, config: LabelConfig) -> Pair:
    encoder = chat_encoder(
        tokenizer,
        chat_template=config.chat_template,
        train_on="assistant" if config.train_on == "all" else config.train_on,
        control_tokens=config.control_tokens,
        template_kwargs={**config.template_kwargs, **example.template_kwargs},
    )

    def encode(example: Example) -> Pair:
        sides = zip(SIDES, (example.messages, example.rejected), strict=True)
        return _pair(encoder.encode([_render(encoder, example, name, side) for name, side in sides]))

    pair = encode(example)
    if config.max_length is None or pair.longest <= config.max_length:
        return pair
    return shorten_chats(example, pair, config.max_length, encode, tokenizer)


def _render(encoder: ChatEncoder, example: Example, name: str, side: list[dict[str, Any]]) -> Rendered:
    """One conversation, rendered as fine-tuning on it would, with the spans of its answer alone."""
    try:
        trained = read_messages(side, train_on=encoder.train_on).trained
        whole = encoder.render(side, example.tools)
    except DataError as error:
        error.reason = f"{name}: {error.reason}"
        raise
    spans = zip(whole.spans, trained, strict=True)
    return Rendered(whole.text, [span for span, turn in spans if turn >= (example.prompt_turns or 0)])


def _pair(labelled: Labelled) -> Pair:
    ids, labels = (np.split(values, labelled.offsets[1:-1]) for values in (labelled.ids, labelled.labels))
    return Pair((ids[0], ids[1]), (labels[0] != IGNORE_INDEX, labels[1] != IGNORE_INDEX))


def _finish(pair: Pair, config: LabelConfig) -> dict[str, list[int]]:
    """The pair as lists, its answers cut to what is left for them; refused where nothing is left to compare."""
    begin, max_length = pair.prompt, config.max_length
    limit = max_length or pair.longest
    if begin >= limit:
        raise NothingSupervisedError(
            f"the prompt takes {begin} tokens where max_length={max_length} and cannot be shortened further, so that no "
            "room is left for an answer; raise max_length, or shorten its system message and what follows its last question"
        )
    made: dict[str, list[int]] = {"prompt_ids": pair.ids[0][:begin].tolist()}
    for name, ids, trained in zip(SIDES, pair.ids, pair.trained, strict=True):
        mask = np.ones(len(ids), bool) if config.train_on == "all" else trained.copy()
        mask[:1] = False  # nothing predicts the first token of all
        if not mask[begin:limit].any():
            where = "" if len(ids) <= limit else f" within max_length={max_length}, of which the prompt takes {begin}"
            raise NothingSupervisedError(f"{name} has no token to train{where}; expected an answer")
        made[f"{name}_ids"], made[f"{name}_mask"] = ids[begin:limit].tolist(), mask[begin:limit].astype(int).tolist()
    if made["chosen_ids"] == made["rejected_ids"] and made["chosen_mask"] == made["rejected_mask"]:
        n, uncut = len(made["chosen_ids"]), pair.longest <= limit
        raise FormatError(
            "chosen and rejected differ, but the template renders them alike; a pair compares two answers"
            if uncut
            else f"chosen and rejected have the same first {n} tokens, and max_length={max_length} leaves no more of them; "
            "raise max_length"
        )
    return made
