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
        kind: equal for turns that look alike up to their text; None where the template does not print the turn in one piece.
        frame_kind: equal for turns of one kind that are followed alike.
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
    kind: Hashable
    frame_kind: Hashable

    @property
    def window(self) -> str:
        """The render from the texts of earlier messages to the end of the turn's first text."""
        return self.text[self.before : self.first]

    @property
    def following(self) -> str | None:
        """Role of the next message."""
        return self.messages[self.k + 1]["role"] if self.k + 1 < len(self.messages) else None


def read_turns(
    messages: list[dict[str, Any]], trained: Sequence[int], found: Sentinels, searched: re.Pattern[str] | None
) -> list[Turn]:
    """The turns `trained` of a conversation, in time that is linear in its length.

    The kind of a turn holds the frame before it, and what a template may look at in the turn itself, in the two messages
    before it, in the first message and in the last question: role, which kinds of content there are, and which are said of
    the strings that the template looks for.

    Args:
        messages: the conversation.
        trained: indices of assistant messages, all of them printed.
        found: where the messages stand in the render.
        searched: pattern of the strings that the template looks for in texts; None for none.
    """
    begins = [_begin(message, i, found) for i, message in enumerate(messages)]
    later = [len(found.text)] * (len(messages) + 1)
    for i in range(len(messages) - 1, -1, -1):
        begin = begins[i]
        if begin is None:
            begin = found.ends[i][0] if i in found.ends else later[i + 1]
        later[i] = min(later[i + 1], begin)
    # A message without sentinels, as they would change the render, is no part of what stands before the first text.
    unseen = (found.text.find(text.strip()) for text in (_texts(messages[0]) if begins[0] is None else ()))
    head = min((place for place in unseen if place >= 0), default=later[0])
    wanted, turns, before = set(trained), [], 0
    shapes = [_shape(message, searched) for message in messages]
    asked: tuple | None = None
    for k, message in enumerate(messages):
        if k in wanted:
            begin, first, end = begins[k], found.ends[k][0], found.ends[k][-1]
            frame_before = "" if begin is None else found.text[before:begin]
            frame_after = found.text[end : later[k + 1]]
            kind = frame_kind = None
            if begin is not None and before <= begin <= first and end <= later[k + 1]:
                bare_before, bare_after = _without_values(messages, k, frame_before, frame_after)
                kind = (shapes[0], asked, *shapes[max(k - 2, 0) : k + 1], bare_before)
                frame_kind = (kind, messages[k + 1]["role"] if k + 1 < len(messages) else None, bare_after)
            turns.append(
                Turn(messages, k, found.text, before, begin, first, end, min(head, later[0]), frame_before, frame_after, kind,
                     frame_kind)
            )  # fmt: skip
        if message["role"] == "user":
            asked = shapes[k]
        before = max(before, found.ends[k][-1]) if k in found.ends else before
    return turns


def _shape(message: dict[str, Any], searched: re.Pattern[str] | None) -> tuple[Hashable, ...]:
    """What a template may look at in a message beside what it prints."""
    said = frozenset(_searched(message, searched)) if searched is not None else ()
    if len(message) == 2:
        return (message["role"], bool(message.get("content")), said)
    reasons = any(message.get(field) for field in REASONING_FIELDS)
    return (message["role"], bool(message.get("content")), said, reasons, min(len(message.get("tool_calls") or ()), 2))


def _begin(message: dict[str, Any], i: int, found: Sentinels) -> int | None:
    """Where the first text of a message, or the name of its first tool, begins in the render."""
    if i not in found.ends:
        return None
    first = found.ends[i][0]
    if i in found.begins and found.begins[i] <= first:
        return found.begins[i]
    calls = message.get("tool_calls")
    names = [calls[0].get("function", calls[0])["name"]] if calls else []
    if i not in found.begins:  # a sentinel there would change the render
        names += [text.strip() for text in _texts(message)]
    longest = max((len(name) for name in names if found.text.endswith(name, 0, first)), default=0)
    return first - longest if longest else None


def _texts(message: dict[str, Any]) -> list[str]:
    texts = list(content_texts(message.get("content")))
    return texts + [message[field] for field in REASONING_FIELDS if message.get(field)]


def _searched(message: dict[str, Any], searched: re.Pattern[str]) -> list[tuple[str, bool, bool, bool]]:
    """The strings that a message says, each with whether a text begins with it, ends with it and is no more than it."""
    found = []
    for text in _texts(message):
        strings = searched.findall(text)
        core = text.strip() if strings else ""
        found += [
            (string, core.startswith(string.strip()), core.endswith(string.strip()), core == string.strip())
            for string in strings
        ]
    return found


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
