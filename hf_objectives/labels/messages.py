"""Messages of a conversation: validated, cleaned for a chat template, and made safe against forged control tokens."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_objectives.errors import ConversationError, VisionContentError, nearest

#: Roles that chat templates in use know. "assistant" is the one whose turns are trained.
ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function", "ipython", "environment"})

# Reasoning goes by three names; `reasoning_content` is the standard one and gpt-oss templates read `thinking`.
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")

# Noncharacter-like private-use code points (plane 16) that no font or text uses. OPEN and CLOSE wrap a literal control
# token so that the template carries it through and the tokenizer can be told to read it as plain text; a lone one
# splits a text at a place where two pieces would join into a control token.
OPEN, CLOSE = "\U0010fff0", "\U0010fff1"
RESERVED = re.compile("[\U00100000-\U0010fff1]")

_MEDIA = ("image", "image_url", "video", "video_url", "audio", "input_audio", "audio_url")


@dataclass(frozen=True, slots=True)
class Turns:
    """A validated conversation.

    Attributes:
        messages: what the template gets: plain dicts without None values, `train` and `weight` removed.
        trained: indices of the assistant messages that are to be trained, in order.
    """

    messages: list[dict[str, Any]]
    trained: list[int]


def read_messages(messages: Any, *, train_on: str = "assistant") -> Turns:
    """Check a conversation and strip what the template must not see.

    Args:
        messages: list of mappings with `role`, `content` and, for the assistant, `tool_calls` and `reasoning_content`;
            a message may carry `train: bool` or `weight: 0 | 1`.
        train_on: "assistant" trains every assistant turn, "last_assistant" the last one only, "all" as "assistant"
            (the caller then trains the rest too).

    Raises:
        ConversationError: no messages, an unknown role, empty or non-string content, a malformed `train`, `weight` or
            tool call; names the turn.
        VisionContentError: image, video or audio content.
    """
    if type(messages) is not list and (
        isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Iterable)
    ):
        raise ConversationError(f"expected a list of messages, found {type(messages).__name__}")
    cleaned, trained = [], []
    for turn, message in enumerate(messages):
        if type(message) is not dict and not isinstance(message, Mapping):
            raise ConversationError(f"expected a message with role and content, found {message!r:.80}", turn=turn)
        role = message.get("role")
        if not isinstance(role, str) or role not in ROLES:
            raise ConversationError(
                f"unknown role {role!r}; expected one of {', '.join(sorted(ROLES))}{nearest(str(role), ROLES)}",
                turn=turn,
            )
        content = message.get("content")
        if type(content) is str and len(message) == 2 and not content.isspace() and content:
            cleaned.append({"role": role, "content": content})
            if role == "assistant":
                trained.append(turn)
            continue
        clean = {key: value for key, value in message.items() if value is not None and key not in ("train", "weight")}
        _check_content(clean, turn)
        if role == "assistant" and is_trained(message, turn):
            trained.append(turn)
        for field in REASONING_FIELDS:
            if clean.get(field):
                clean = {"thinking": clean[field], **clean, "reasoning_content": clean[field]}
                break
        cleaned.append(clean)
    if not cleaned:
        raise ConversationError("no messages; expected at least one user and one assistant message")
    if train_on == "last_assistant":
        last = max((i for i, m in enumerate(cleaned) if m["role"] == "assistant"), default=None)
        trained = [i for i in trained if i == last]
    return Turns(cleaned, trained)


def is_trained(message: Mapping[str, Any], turn: int) -> bool:
    """What a message's own `train` and `weight` say; both default to yes.

    Raises:
        ConversationError: `train` is not a bool, or `weight` is neither 0 nor 1.
    """
    train, weight = message.get("train"), message.get("weight")
    if train is not None and not isinstance(train, bool):
        raise ConversationError(f"train is {train!r}; expected true or false", turn=turn)
    if weight is not None and (isinstance(weight, str) or weight not in (0, 1)):
        raise ConversationError(
            f"weight is {weight!r}; expected 0 or 1 (per-token weights go in loss_weights)", turn=turn
        )
    return train is not False and weight != 0


def _check_content(message: dict[str, Any], turn: int) -> None:
    """Raise ConversationError unless the message says something in text, a tool call or reasoning."""
    role, content = message["role"], message.get("content")
    calls = message.get("tool_calls")
    if calls is not None:
        _check_calls(role, calls, turn)
        if not calls:
            del message["tool_calls"]
    for field in REASONING_FIELDS:
        if field in message and not isinstance(message[field], str):
            raise ConversationError(f"{field} is {type(message[field]).__name__}; expected a string", turn=turn)
    texts = list(content_texts(content, turn))
    says_other = bool(calls) or (role == "assistant" and any(message.get(field) for field in REASONING_FIELDS))
    # A tool may well answer with nothing; everybody else who says nothing is a fault in the data.
    if not says_other and role not in ("tool", "function", "ipython") and not any(text.strip() for text in texts):
        raise ConversationError(f"empty content in a message of role {role!r}; expected text", turn=turn)


def _check_calls(role: str, calls: Any, turn: int) -> None:
    if role != "assistant":
        raise ConversationError(f"tool_calls in a message of role {role!r}; only the assistant calls tools", turn=turn)
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise ConversationError(f"tool_calls is {type(calls).__name__}; expected a list of calls", turn=turn)
    for call in calls:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
            raise ConversationError(
                f'tool call {call!r:.120} has no name; expected {{"function": {{"name": ..., "arguments": ...}}}}',
                turn=turn,
            )


def content_texts(content: Any, turn: int | None = None) -> Iterable[str]:
    """The texts of a message's content: itself when it is a string, those of its blocks when it is a list.

    Raises:
        VisionContentError: a block is an image, a video or audio.
        ConversationError: content or a block is neither text nor a list of text blocks.
    """
    if content is None:
        return
    if isinstance(content, str):
        yield content
        return
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise ConversationError(f"content is {type(content).__name__}; expected a string", turn=turn)
    for block in content:
        kind = block.get("type", "text") if isinstance(block, Mapping) else None
        if kind in _MEDIA or (isinstance(block, Mapping) and any(block.get(key) is not None for key in _MEDIA)):
            raise VisionContentError(f"{kind} content; these objectives train text only", turn=turn)
        if not isinstance(block, Mapping) or not isinstance(block.get("text"), str):
            raise ConversationError(f'content block {block!r:.80}; expected {{"type": "text", "text": ...}}', turn=turn)
        yield block["text"]


class ControlTokens:
    """Finds literal control tokens in untrusted text and wraps them so that they are tokenised as plain text.

    Args:
        tokens: the control tokens, those that turn a conversation's structure.
    """

    def __init__(self, tokens: Iterable[str]) -> None:
        self.tokens = longest_first = sorted(set(tokens), key=lambda token: (-len(token), token))
        self.pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self.first = {token[0] for token in longest_first}
        self.prefixes = {token[:n] for token in longest_first for n in range(1, len(token))}
        self.suffixes = {token[-n:] for token in longest_first for n in range(1, len(token))}
        self.longest = max(map(len, longest_first), default=1)

    def touches(self, text: str) -> bool:
        """True when `text` holds a control token, or an edge of it could become one by joining with a neighbour."""
        return any(first in text for first in self.first) and (
            self.pattern.search(text) is not None or self._open_end(text) or self._open_start(text)
        )

    def wrap(self, text: str) -> str:
        """`text` with every control token wrapped in OPEN and CLOSE, and open edges closed by a lone CLOSE."""
        wrapped = self.pattern.sub(f"{OPEN}\\g<0>{CLOSE}", text)
        return (CLOSE if self._open_start(text) else "") + wrapped + (CLOSE if self._open_end(text) else "")

    def wrap_all(self, value: Any) -> Any:
        """`wrap` on every string of a JSON value, keys included."""
        if isinstance(value, str):
            return self.wrap(value) if self.touches(value) else value
        if isinstance(value, Mapping):
            return {self.wrap_all(key): self.wrap_all(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.wrap_all(item) for item in value]
        return value

    def _open_end(self, text: str) -> bool:
        return any(text[-n:] in self.prefixes for n in range(1, min(self.longest, len(text) + 1)))

    def _open_start(self, text: str) -> bool:
        return any(text[:n] in self.suffixes for n in range(1, min(self.longest, len(text) + 1)))


# What the template prints of a message. Roles and block types steer its logic and are validated instead.
_PRINTED = (
    *("content", "reasoning_content", "thinking", "reasoning"),
    *("tool_calls", "name", "tool_call_id", "tool_responses", "call_text"),
)


def defuse(
    messages: list[dict], untrusted: ControlTokens | None, structural: ControlTokens | None
) -> list[dict[str, Any]]:
    """Messages in which control tokens cannot be forged.

    Everything that the assistant did not write is wrapped for every control token. The assistant's own text keeps its
    markup (`<think>`, say), but cannot forge the tokens that open and close turns.

    Args:
        messages: the conversation.
        untrusted: the control tokens; None to leave the texts as they are.
        structural: those that open and close turns.

    Raises:
        ConversationError: a text holds a code point that this library uses as a sentinel.
    """
    defused = []
    for turn, message in enumerate(messages):
        guard = structural if message["role"] == "assistant" else untrusted
        touched = False
        content = message.get("content")
        for text in (content,) if type(content) is str and len(message) == 2 else _strings(message):
            if not text.isascii() and (found := RESERVED.search(text)):
                raise ConversationError(
                    f"private-use character U+{ord(found.group()):X}, which this library uses as a sentinel", turn=turn
                )
            touched = touched or (guard is not None and guard.touches(text))
        if touched and guard is not None:
            message = {key: guard.wrap_all(value) if key in _PRINTED else value for key, value in message.items()}
        defused.append(message)
    return defused


def _strings(value: Any) -> Iterator[str]:
    """Every string in a JSON value, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from (key,) if isinstance(key, str) else ()
            yield from _strings(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _strings(item)
