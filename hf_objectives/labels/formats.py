"""Read a row in any of the accepted formats into one form, `Example`.

The columns of a row tell its format: `text`; `messages` (OpenAI); `conversations` (ShareGPT);
`instruction`/`input`/`output` (Alpaca); `prompt`/`completion`; preference `chosen`/`rejected`, with or without `prompt`,
plain, conversational or ShareGPT; tokenised `input_ids` (and `labels`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from hf_objectives.errors import ConversationError, FormatError, VisionContentError
from hf_objectives.labels.message_forms import CALL_TEXT
from hf_objectives.labels.pair_prompt import join_prompt, split_texts
from hf_objectives.types import Row, check_one_of, parse_json

_VISION = ("image", "images", "pixel_values", "video", "videos", "audio", "audios")
_SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(
        ("gpt", "assistant", "chatgpt", "bing", "bard", "model", "function_call", "tool_call"), "assistant"
    ),
    **dict.fromkeys(("observation", "tool", "function_response"), "tool"),
    "system": "system",
}
_CALLS = ("function_call", "tool_call")


class Kind(StrEnum):
    """What a row is, whatever its format."""

    TEXT = "text"
    PROMPT_COMPLETION = "prompt_completion"
    MESSAGES = "messages"
    PREFERENCE = "preference"
    TOKENS = "tokens"


@dataclass(frozen=True, slots=True)
class Example:
    """One row in one form.

    Attributes:
        kind: TEXT (a document), PROMPT_COMPLETION (a text that begins with a prompt), MESSAGES (a conversation),
            PREFERENCE (two conversations, or two texts) or TOKENS (encoded already).
        text: the document; of a prompt and completion, both joined as they are; of a preference row in plain text, the
            prompt and the chosen answer.
        prompt_chars: how many characters of the text are prompt.
        rejected_text: of a preference row in plain text, the prompt and the rejected answer; None of any other row.
        messages: the conversation; of a preference row, the chosen one.
        rejected: of a preference row, the rejected conversation.
        prompt_turns: how many messages of both conversations of a preference row are its prompt; None where the row has no
            prompt of its own, so that the prompt is what both begin with.
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
        return self.kind is Kind.TEXT or self.kind is Kind.PROMPT_COMPLETION or self.rejected_text is not None


def detect_format(row: Row) -> str:
    """Name the format of a row, a key of FORMATS, by its columns that are not None.

    Raises:
        FormatError: no format fits; names the columns found.
        VisionContentError: the row has images, video or audio.
    """
    if type(row) is not dict and not isinstance(row, Mapping):
        raise FormatError(f"a row is {type(row).__name__}; expected a mapping of column names to values")
    present = {key for key, value in row.items() if value is not None}
    if media := sorted(present.intersection(_VISION)):
        raise VisionContentError(f"column {media[0]!r}: image, video and audio rows are not supported, text only")
    for name, (columns, _) in FORMATS.items():
        if columns <= present:
            return name
    raise FormatError(
        f"unknown row format with columns {', '.join(sorted(present - {'source', 'row'})) or '(none)'}; expected one of "
        + "; ".join(" + ".join(sorted(columns)) for columns, _ in FORMATS.values())
    )


def to_example(row: Row, *, format: str | None = None) -> Example:
    """Read a row.

    Args:
        row: a mapping of column names to values.
        format: a key of FORMATS; None to detect it.

    Raises:
        FormatError: the row lacks what its format needs.
        ConversationError, VisionContentError: the conversation in the row is malformed.
        ConfigError: an unknown format.
    """
    name = format or detect_format(row)
    if name not in FORMATS:
        check_one_of("format", name, FORMATS)
    return FORMATS[name][1](row)


def _text(row: Row) -> Example:
    if not isinstance(row["text"], str):
        raise FormatError(f"text is {type(row['text']).__name__}; expected a string")
    return Example(Kind.TEXT, text=row["text"])


def _tokens(row: Row) -> Example:
    return Example(Kind.TOKENS, input_ids=row["input_ids"], labels=row.get("labels"))


def _messages(row: Row) -> Example:
    return _chat(row, messages=_list(row["messages"], "messages"))


def _sharegpt(row: Row) -> Example:
    return _chat(row, messages=_system(row) + _sharegpt_messages(row["conversations"]))


def _alpaca(row: Row) -> Example:
    instruction, extra, output = row["instruction"], row.get("input"), row["output"]
    for name, value in (("instruction", instruction), ("input", extra or ""), ("output", output)):
        if not isinstance(value, str):
            raise FormatError(f"{name} is {type(value).__name__}; expected a string")
    history: list[dict[str, Any]] = []
    if not isinstance(row.get("history") or (), (list, tuple)):
        raise FormatError(f"history is {row['history']!r:.80}; expected a list of pairs")
    for pair in row.get("history") or ():
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise FormatError(f"history holds {pair!r:.80}; expected pairs of a question and its answer")
        history += _exchange(*pair)
    question = f"{instruction}\n\n{extra}" if extra else instruction
    return Example(Kind.MESSAGES, messages=[*_system(row), *history, *_exchange(question, output)])


def _prompt_completion(row: Row) -> Example:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):  # plain text: no template, as in TRL
        return Example(Kind.PROMPT_COMPLETION, text=prompt + completion, prompt_chars=len(prompt))
    # Only the completion is trained, not the assistant turns of the prompt.
    asked = [{**turn, "train": False} if isinstance(turn, Mapping) else turn for turn in _list(prompt, "prompt")]
    return _chat(row, messages=asked + _list(completion, "completion"))


def _preference(row: Row) -> Example:
    """Both sides as whole conversations, or as whole texts, each with the prompt before it."""
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    sharegpt = row.get("conversations")
    if sharegpt is None and isinstance(chosen, str) and isinstance(rejected, str) and isinstance(prompt, str | None):
        texts = (prompt or "") + chosen, (prompt or "") + rejected  # plain text: no template, as in TRL
        prompt_chars = split_texts(*texts) if prompt is None else len(prompt)
        return Example(Kind.PREFERENCE, text=texts[0], prompt_chars=prompt_chars, rejected_text=texts[1])
    head = _system(row)
    sides = [_turns(chosen, "chosen", "assistant"), _turns(rejected, "rejected", "assistant")]
    if sharegpt is not None:
        prompt = _sharegpt_messages(sharegpt)
    if prompt is not None:
        head, sides = join_prompt(head + _turns(prompt, "prompt", "user"), sides)
    prompt_turns = None if prompt is None else len(head)
    return _chat(row, Kind.PREFERENCE, messages=head + sides[0], rejected=head + sides[1], prompt_turns=prompt_turns)


def _turns(value: Any, name: str, role: str) -> list[dict[str, Any]]:
    """Messages, OpenAI's or ShareGPT's: a list, one alone, or the text of one of `role`."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    turns = _list([value] if isinstance(value, Mapping) else value, name)
    if any(isinstance(turn, Mapping) and "from" in turn for turn in turns):
        return _sharegpt_messages(turns)
    return turns


#: The formats by name: the columns that a row of the format has, and its reader. The first that fits is taken.
FORMATS: dict[str, tuple[frozenset[str], Callable[[Row], Example]]] = {
    "tokens": (frozenset({"input_ids"}), _tokens),
    "preference": (frozenset({"chosen", "rejected"}), _preference),
    "messages": (frozenset({"messages"}), _messages),
    "sharegpt": (frozenset({"conversations"}), _sharegpt),
    "prompt_completion": (frozenset({"prompt", "completion"}), _prompt_completion),
    "alpaca": (frozenset({"instruction", "output"}), _alpaca),
    "text": (frozenset({"text"}), _text),
}
#: Columns that may make a row something other than a text, although it has a column `text`.
NOT_TEXT = frozenset(_VISION).union(*(columns for columns, _ in FORMATS.values())) - {"text"}


def _exchange(question: str, answer: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _system(row: Row) -> list[dict[str, Any]]:
    return [{"role": "system", "content": row["system"]}] if row.get("system") else []


def _chat(row: Row, kind: Kind = Kind.MESSAGES, **conversations: Any) -> Example:
    """A conversation, or two, with the tools and the template variables of the row."""
    kwargs = row.get("chat_template_kwargs")
    if isinstance(kwargs, str):
        kwargs = _json(kwargs, "chat_template_kwargs is")
    if not isinstance(kwargs or {}, Mapping):
        raise FormatError(f"chat_template_kwargs is {kwargs!r:.80}; expected a mapping of names to values")
    kwargs = {key: value for key, value in (kwargs or {}).items() if value is not None}
    return Example(kind, tools=row.get("tools"), template_kwargs=kwargs, **conversations)


def _json(text: str, what: str, turn: int | None = None) -> Any:
    """Parse JSON text; `what` begins the error, for example "messages is"."""
    try:
        return parse_json(text)
    except ValueError as error:
        kind = FormatError if turn is None else ConversationError
        raise kind(f"{what} text but not JSON ({error}): {text[:80]!r}", turn=turn) from error


def _list(value: Any, name: str) -> list:
    """A list of messages; their tool calls are parsed and lack the null keys that an Arrow struct adds."""
    if isinstance(value, str):  # a conversation stored as JSON text, so that no Arrow struct mixes its keys
        value = _json(value, f"{name} is")
    if isinstance(value, Mapping) or not hasattr(value, "__iter__"):
        raise FormatError(f"{name} is {type(value).__name__}; expected a list of messages")
    return [
        _read_calls(turn) if isinstance(turn, Mapping) and turn.get("tool_calls") is not None else turn
        for turn in value
    ]


def _read_calls(message: Mapping[str, Any]) -> dict[str, Any]:
    calls = message["tool_calls"]
    if isinstance(calls, str):
        calls = _json(calls, "tool_calls is")
    return {**message, "tool_calls": drop_nulls(calls)}


def _sharegpt_messages(turns: Any) -> list[dict[str, Any]]:
    """ShareGPT turns as messages; `function_call` turns become tool calls and `observation` turns tool results."""
    messages: list[dict[str, Any]] = []
    for turn, entry in enumerate(_list(turns, "conversations")):
        if isinstance(entry, Mapping) and "role" in entry and "from" not in entry:
            messages.append(dict(entry))
            continue
        if not isinstance(entry, Mapping) or "from" not in entry or "value" not in entry:
            raise ConversationError(f'found {entry!r:.80}; expected {{"from": ..., "value": ...}}', turn=turn)
        speaker, value = entry["from"], entry["value"]
        role = _SHAREGPT_ROLES.get(speaker) if isinstance(speaker, str) else None
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
    calls = _json(value, "function_call is", turn) if isinstance(value, str) else value
    built = []
    for call in calls if isinstance(calls, list) else [calls]:
        if not isinstance(call, Mapping) or "name" not in call:
            raise ConversationError(
                f'function_call {call!r:.80} has no name; expected {{"name", "arguments"}}', turn=turn
            )
        arguments = call.get("arguments", {})
        if isinstance(arguments, str):
            arguments = _json(arguments, f"arguments of {call['name']!r} are", turn)
        built.append({"type": "function", "function": {"name": call["name"], "arguments": arguments}})
    return built


def drop_nulls(value: Any) -> Any:
    """A JSON value without the keys whose value is None.

    `datasets` stores tools with different parameters as one struct, in which each has the keys of all the others as
    null. A key that its author set to null looks the same, so it goes too; members of lists stay.
    """
    if isinstance(value, Mapping):
        return {key: drop_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [drop_nulls(item) for item in value]
    return value
