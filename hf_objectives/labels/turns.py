"""The assistant's turns of a rendered conversation, and the key of what a template prints around each."""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from hf_objectives.labels.messages import REASONING_FIELDS, content_texts
from hf_objectives.labels.sentinels import Sentinels

# Arguments that are no strings, as JSON or as Python writes them: they differ from call to call.
_SCALAR = re.compile(r"-?\b\d+(?:\.\d+)?(?:[eE][+-]?\d+)?\b|\b(?:true|false|null|True|False|None)\b")


@dataclass(frozen=True, slots=True)
class Turn:
    """A turn that is to be trained, in the render of its conversation.

    In `<u>Hi</s><a>Hello</s><u>Bye`, the turn `Hello` has the frame `</s><a>` before it and `</s><u>` after it.

    Attributes:
        messages: the conversation.
        k: which message the turn is.
        text: the render of the conversation.
        before: where the last text of an earlier message ends.
        begin: where the turn's own first text begins; None where that is not known.
        first, end: where the turn's first and its last text end.
        head: where the first text of the conversation begins.
        frame_before: the render between the texts of earlier messages and `begin`.
        frame_after: the render between `end` and the first text of a later message.
        key: equal for turns that the template frames in the same way; None where that is not known.
    """

    messages: list[dict[str, Any]]
    k: int
    text: str
    before: int
    begin: int | None
    first: int
    end: int
    head: int
    frame_before: str
    frame_after: str
    key: Hashable

    @property
    def window(self) -> str:
        """The render from the texts of earlier messages to the end of the turn's first text."""
        return self.text[self.before : self.first]

    @property
    def following(self) -> str | None:
        """Role of the next message."""
        return self.messages[self.k + 1]["role"] if self.k + 1 < len(self.messages) else None


def read_turns(
    messages: list[dict[str, Any]],
    trained: Sequence[int],
    found: Sentinels,
    searched: re.Pattern[str] | None,
    *,
    distinct: bool = False,
) -> list[Turn]:
    """The turns `trained` of a conversation, in time that is linear in its length.

    A turn's key holds everything that templates in use look at: the frames in the render; role, content, reasoning and
    calls of the turn and of the two messages before it; the kinds of messages since the last user message and before; and
    which of the strings that the template searches for were said, in order.

    Args:
        messages: the conversation.
        trained: indices of assistant messages, all of them printed.
        found: where the messages stand in the render.
        searched: pattern of the strings that the template looks for in texts.
        distinct: only turns before which no text was said twice have a key, for templates that compare texts.
    """
    begins = [_begin(message, i, found) for i, message in enumerate(messages)]
    later = [len(found.text)] * (len(messages) + 1)
    for i in range(len(messages) - 1, -1, -1):
        begin = begins[i]
        if begin is None:
            begin = found.ends[i][0] if i in found.ends else later[i + 1]
        later[i] = min(later[i + 1], begin)
    wanted, turns, before = set(trained), [], 0
    shapes: list[tuple] = [(), ()]
    seen: frozenset[tuple] = frozenset()
    since: frozenset[tuple] = frozenset()  # the last user message
    said: dict[tuple[str, str], None] = {}
    texts: set[str] = set()
    repeated = False
    for k, message in enumerate(messages):
        shape = (
            message["role"],
            bool(message.get("content")),
            any(message.get(field) for field in REASONING_FIELDS) if len(message) > 2 else False,
            min(len(message.get("tool_calls") or ()), 2),
        )
        shapes.append(shape)
        for string in set(_searched(message, searched)) if searched is not None else ():
            said.pop((message["role"], string), None)
            said[message["role"], string] = None
        if distinct:
            for text in content_texts(message.get("content")):
                repeated = repeated or text.strip() in texts
                texts.add(text.strip())
        if k in wanted:
            begin, first, end = begins[k], found.ends[k][0], found.ends[k][-1]
            frame_before = "" if begin is None else found.text[before:begin]
            frame_after = found.text[end : later[k + 1]]
            key = None
            if not repeated and begin is not None and before <= begin <= first and end <= later[k + 1]:
                following = messages[k + 1]["role"] if k + 1 < len(messages) else None
                key = (*shapes[-3:], following, min(k, 2), seen, since, tuple(said))
                key += _without_values(messages, k, frame_before, frame_after)
            turns.append(
                Turn(messages, k, found.text, before, begin, first, end, later[0], frame_before, frame_after, key)
            )  # fmt: skip
        if shape not in seen:
            seen |= {shape}
        since = frozenset([shape]) if message["role"] == "user" else since if shape in since else since | {shape}
        before = max(before, found.ends[k][-1]) if k in found.ends else before
    return turns


def _begin(message: dict[str, Any], i: int, found: Sentinels) -> int | None:
    """Where the first text of a message, or the name of its first tool, begins in the render."""
    if i not in found.ends:
        return None
    first = found.ends[i][0]
    if i in found.begins and found.begins[i] <= first:
        return found.begins[i]
    calls = message.get("tool_calls")
    name = calls[0].get("function", calls[0])["name"] if calls else ""
    return first - len(name) if name and found.text.startswith(name, first - len(name)) else None


def _searched(message: dict[str, Any], searched: re.Pattern[str]) -> list[str]:
    texts = list(content_texts(message.get("content")))
    if len(message) > 2:
        texts += [message[field] for field in REASONING_FIELDS if message.get(field)]
    return [string for text in texts for string in searched.findall(text)]


def _without_values(messages: list[dict[str, Any]], k: int, before: str, after: str) -> tuple[str, str]:
    """The frames of turn k without ids, names and numbers of its own and its neighbours' calls."""
    values = []
    for message in messages[max(k - 1, 0) : k + 2]:
        if len(message) > 2:
            values += [message.get("tool_call_id"), message.get("name")]
            values += [call.get("id") for call in message.get("tool_calls") or ()]
    for value in values:
        if isinstance(value, str) and value:
            before, after = before.replace(value, "\0"), after.replace(value, "\0")
    if messages[k].get("tool_calls"):
        after = _SCALAR.sub("\0", after)
    if k and messages[k - 1].get("tool_calls"):
        before = _SCALAR.sub("\0", before)
    return before, after
