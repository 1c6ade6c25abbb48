"""Rows as they come to one form: which of the field's formats a row is in, and what it says.

Recognised from one row: `text`; `messages` (OpenAI); `conversations` (ShareGPT); `instruction`/`input`/`output`
(Alpaca); `prompt`/`completion`; preference `chosen`/`rejected`, with or without `prompt`, plain, conversational or
ShareGPT; already tokenised `input_ids` (and `labels`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from hf_objectives.errors import ConversationError, FormatError, VisionContentError
from hf_objectives.labels.message_forms import CALL_TEXT
from hf_objectives.labels.pair_prompt import join_prompt, split_texts
from hf_objectives.types import Row

Kind = Literal["text", "prompt_completion", "messages", "preference", "tokens"]

_VISION = ("image", "images", "pixel_values", "video", "videos", "audio", "audios")
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "system": "system",
    "function_call": "assistant",
    "tool_call": "assistant",
    "observation": "tool",
    "tool": "tool",
    "function_response": "tool",
}
_CALLS = ("function_call", "tool_call")


@dataclass(frozen=True, slots=True)
class Example:
    """One row in one form.

    Attributes:
        kind: "text" (a document), "prompt_completion" (one whose beginning is a prompt), "messages" (a conversation),
            "preference" (two conversations, or two texts), "tokens" (encoded already).
        text: the document; of a prompt-completion row, the prompt and the completion, joined as they are; of a preference
            row in plain text, the prompt and the chosen answer.
        prompt_chars: how much of the text is prompt.
        rejected_text: of a preference row in plain text, the prompt and the rejected answer; None of any other row.
        messages: the conversation; of a preference row, the chosen one.
        rejected: of a preference row, the rejected conversation.
        prompt_turns: of a preference row, how many messages of both conversations are a prompt of its own; None where
            it has none, and what the two begin with is the prompt.
        tools: tool schemas, as the row gives them.
        input_ids, labels: of an encoded row; labels default to the ids.
        template_kwargs: `chat_template_kwargs` of the row.
    """

    kind: Kind
    text: str = ""
    prompt_chars: int = 0
    rejected_text: str | None = None
    messages: list[dict[str, Any]] = field(default_factory=list)
    rejected: list[dict[str, Any]] = field(default_factory=list)
    prompt_turns: int | None = None
    tools: Any = None
    input_ids: Any = None
    labels: Any = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def is_plain(self) -> bool:
        """Whether the row is text, which no chat template renders."""
        return self.kind in ("text", "prompt_completion") or self.rejected_text is not None


def detect_format(row: Row) -> str:
    """Name of the format of a row, a key of FORMATS.

    Raises:
        FormatError: no format fits, or the row has the keys of two; says which keys were found.
        VisionContentError: the row carries images, video or audio.
    """
    if type(row) is not dict and not isinstance(row, Mapping):
        raise FormatError(f"a row is {type(row).__name__}; expected a mapping of column names to values")
    present = {key for key, value in row.items() if value is not None}
    if media := sorted(present.intersection(_VISION)):
        raise VisionContentError(f"column {media[0]!r}: image, video and audio rows are not supported, text only")
    for names, name in _KEYS:
        if names <= present:
            return name
    raise FormatError(
        f"unknown row format with columns {', '.join(sorted(present - {'source', 'row'})) or '(none)'}; expected one of "
        + "; ".join(" + ".join(sorted(names)) for names, _ in _KEYS)
    )


def to_example(row: Row, *, format: str | None = None) -> Example:
    """Read a row.

    Args:
        row: a mapping of column names to values.
        format: a key of FORMATS; recognised from the row when None.

    Raises:
        FormatError: unknown format, or the row lacks what its format needs.
        ConversationError, VisionContentError: the conversation in the row is malformed.
    """
    name = format or detect_format(row)
    if name not in FORMATS:
        raise FormatError(f"unknown row format {name!r}; expected one of {', '.join(FORMATS)}")
    return FORMATS[name](row)


def _text(row: Row) -> Example:
    if not isinstance(row["text"], str):
        raise FormatError(f"text is {type(row['text']).__name__}; expected a string")
    return Example("text", text=row["text"])


def _tokens(row: Row) -> Example:
    return Example("tokens", input_ids=row["input_ids"], labels=row.get("labels"))


def _messages(row: Row) -> Example:
    messages = [_arrow_clean(message) for message in _list(row["messages"], "messages")]
    return Example("messages", messages=messages, tools=row.get("tools"), template_kwargs=_kwargs(row))


def _sharegpt(row: Row) -> Example:
    messages = _system(row) + _sharegpt_messages(row["conversations"])
    return Example("messages", messages=messages, tools=row.get("tools"), template_kwargs=_kwargs(row))


def _alpaca(row: Row) -> Example:
    instruction, extra, output = row["instruction"], row.get("input"), row["output"]
    for name, value in (("instruction", instruction), ("input", extra or ""), ("output", output)):
        if not isinstance(value, str):
            raise FormatError(f"{name} is {type(value).__name__}; expected a string")
    history = [message for pair in row.get("history") or () for message in _exchange(*pair)]
    question = f"{instruction}\n\n{extra}" if extra else instruction
    return Example("messages", messages=[*_system(row), *history, *_exchange(question, output)])


def _prompt_completion(row: Row) -> Example:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):  # plain text: no template, as in TRL
        return Example("prompt_completion", text=prompt + completion, prompt_chars=len(prompt))
    # Earlier assistant turns are the prompt's: only the completion is what the model is to learn.
    given = [{**_arrow_clean(message), "train": False} for message in _list(prompt, "prompt")]
    messages = given + [_arrow_clean(message) for message in _list(completion, "completion")]
    return Example("messages", messages=messages, tools=row.get("tools"), template_kwargs=_kwargs(row))


def _preference(row: Row) -> Example:
    """Both sides as whole conversations, or as whole texts, each with the prompt before it."""
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    asked = row.get("conversations")
    if asked is None and isinstance(chosen, str) and isinstance(rejected, str) and isinstance(prompt, str | None):
        text = chosen if prompt is None else prompt + chosen  # plain text: no template, as in TRL
        other = rejected if prompt is None else prompt + rejected
        at = split_texts(text, other) if prompt is None else len(prompt)
        return Example("preference", text=text, prompt_chars=at, rejected_text=other)
    answers = [_side(side, name) for name, side in (("chosen", chosen), ("rejected", rejected))]
    given: list[dict[str, Any]] | None = None
    head = _system(row)
    if asked is not None:
        given = _sharegpt_messages(asked)
    elif prompt is not None:
        given = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else _turns(prompt, "prompt")
    if given is not None:
        head, answers = join_prompt(head + given, answers)
    return Example(
        "preference",
        messages=head + answers[0],
        rejected=head + answers[1],
        prompt_turns=None if given is None else len(head),
        tools=row.get("tools"),
        template_kwargs=_kwargs(row),
    )


def _side(side: Any, name: str) -> list[dict[str, Any]]:
    if isinstance(side, str):
        return [{"role": "assistant", "content": side}]
    return _turns([side] if isinstance(side, Mapping) else side, name)


def _turns(value: Any, name: str) -> list[dict[str, Any]]:
    """A list of messages, OpenAI's or ShareGPT's."""
    turns = _list(value, name)
    if any(isinstance(turn, Mapping) and "from" in turn for turn in turns):
        return _sharegpt_messages(turns)
    return [_arrow_clean(turn) for turn in turns]


#: The formats, by name.
FORMATS: dict[str, Callable[[Row], Example]] = {
    "tokens": _tokens,
    "preference": _preference,
    "messages": _messages,
    "sharegpt": _sharegpt,
    "prompt_completion": _prompt_completion,
    "alpaca": _alpaca,
    "text": _text,
}
_KEYS: tuple[tuple[frozenset[str], str], ...] = (
    (frozenset({"input_ids"}), "tokens"),
    (frozenset({"chosen", "rejected"}), "preference"),
    (frozenset({"messages"}), "messages"),
    (frozenset({"conversations"}), "sharegpt"),
    (frozenset({"prompt", "completion"}), "prompt_completion"),
    (frozenset({"instruction", "output"}), "alpaca"),
    (frozenset({"text"}), "text"),
)


def _exchange(question: str, answer: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _system(row: Row) -> list[dict[str, Any]]:
    system = row.get("system")
    if system is None or system == "":
        return []
    return [{"role": "system", "content": system}]


def _kwargs(row: Row) -> dict[str, Any]:
    given = row.get("chat_template_kwargs")
    if isinstance(given, str):
        given = json.loads(given)
    return {key: value for key, value in (given or {}).items() if value is not None}


def _list(value: Any, name: str) -> list:
    if isinstance(value, str):  # a conversation stored as JSON text, so that no Arrow struct mixes its keys
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise FormatError(f"{name} is text but not JSON ({error}); expected a list of messages") from error
    if isinstance(value, Mapping) or not hasattr(value, "__iter__"):
        raise FormatError(f"{name} is {type(value).__name__}; expected a list of messages")
    return list(value)


def _sharegpt_messages(turns: Any) -> list[dict[str, Any]]:
    """ShareGPT turns as messages; `function_call` turns become tool calls and `observation` turns tool results."""
    messages: list[dict[str, Any]] = []
    for turn, entry in enumerate(_list(turns, "conversations")):
        if isinstance(entry, Mapping) and "role" in entry and "from" not in entry:
            messages.append(_arrow_clean(entry))
            continue
        if not isinstance(entry, Mapping) or "from" not in entry or "value" not in entry:
            raise ConversationError(f'found {entry!r:.80}; expected {{"from": ..., "value": ...}}', turn=turn)
        speaker, value = entry["from"], entry["value"]
        role = _SHAREGPT_ROLES.get(speaker)
        if role is None:
            raise ConversationError(
                f"unknown speaker {speaker!r}; expected one of {', '.join(_SHAREGPT_ROLES)}", turn=turn
            )
        message: dict[str, Any] = {"role": role, "content": value}
        if speaker in _CALLS:
            # The author's own text stays beside the parsed call, for templates that know no tool calls (message_forms.py).
            message = {"role": role, "content": "", "tool_calls": _calls(value, turn)}
            if isinstance(value, str):
                message[CALL_TEXT] = value
        for policy in ("train", "weight"):
            if entry.get(policy) is not None:
                message[policy] = entry[policy]
        messages.append(message)
    return messages


def _calls(value: Any, turn: int) -> list[dict[str, Any]]:
    try:
        calls = json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError as error:
        raise ConversationError(f"function_call is not JSON ({error}): {value[:80]!r}", turn=turn) from error
    listed = calls if isinstance(calls, list) else [calls]
    built = []
    for call in listed:
        if not isinstance(call, Mapping) or "name" not in call:
            raise ConversationError(
                f'function_call {call!r:.80} has no name; expected {{"name", "arguments"}}', turn=turn
            )
        arguments = call.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except json.JSONDecodeError as error:
                raise ConversationError(f"arguments of {call['name']!r} are not JSON ({error})", turn=turn) from error
        built.append({"type": "function", "function": {"name": call["name"], "arguments": arguments}})
    return built


def _arrow_clean(message: Any) -> Any:
    """A message without the null keys that an Arrow struct adds to its tool calls; JSON text of them is parsed."""
    if not isinstance(message, Mapping) or message.get("tool_calls") is None:
        return message
    calls = message["tool_calls"]
    if isinstance(calls, str):
        try:
            calls = json.loads(calls)
        except json.JSONDecodeError as error:
            raise FormatError(f"tool_calls is text but not JSON ({error})") from error
    return {**message, "tool_calls": drop_nulls(calls)}


def drop_nulls(value: Any) -> Any:
    """A JSON value without the keys whose value is None.

    `datasets` stores tools with different parameters as one struct, in which each has the keys of all the others as
    null. A key that its author set to null cannot be told from these and goes too; members of lists stay.
    """
    if isinstance(value, Mapping):
        return {key: drop_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [drop_nulls(item) for item in value]
    return value
