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

    A turn's key holds the frames in the render; role, content, reasoning and calls of the turn and of the two messages
    before it; the kinds of messages since the last user message and before; and which of the strings that the template
    searches for were said, in which order and by whom. `steadiness.py` says which templates look at more.

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
    history = _History(searched, distinct)
    for k, message in enumerate(messages):
        history.add(message)
        if k in wanted:
            begin, first, end = begins[k], found.ends[k][0], found.ends[k][-1]
            frame_before = "" if begin is None else found.text[before:begin]
            frame_after = found.text[end : later[k + 1]]
            key = None
            if not history.repeated and begin is not None and before <= begin <= first and end <= later[k + 1]:
                following = messages[k + 1]["role"] if k + 1 < len(messages) else None
                key = (*history.key(), following, *_without_values(messages, k, frame_before, frame_after))
            turns.append(
                Turn(messages, k, found.text, before, begin, first, end, later[0], frame_before, frame_after, key)
            )  # fmt: skip
        before = max(before, found.ends[k][-1]) if k in found.ends else before
    return turns


class _History:
    """What templates look at in the messages up to a turn.

    Args:
        searched: pattern of the strings that the template looks for in texts.
        distinct: whether the template compares texts with each other.
    """

    def __init__(self, searched: re.Pattern[str] | None, distinct: bool) -> None:
        self.searched, self.distinct = searched, distinct
        self.shapes: list[tuple] = [(), ()]
        self.said: list[frozenset[tuple]] = [frozenset(), frozenset()]  # by each message
        self.order: dict[tuple, None] = {}  # what was said by which role, the latest last
        self.asked: frozenset[tuple] = frozenset()  # by the last user message
        self.seen: frozenset[tuple] = frozenset()  # shapes before the last message
        self.since: frozenset[tuple] = frozenset()  # the same from the last user message on
        self._new: tuple | None = None
        self.texts: set[str] = set()
        self.repeated = False

    def add(self, message: dict[str, Any]) -> None:
        """Go on to the next message."""
        if self._new is not None:
            before, user = self._new, self._new[0] == "user"
            self.seen |= {before}
            self.since = frozenset([before]) if user else self.since | {before}
        self._new = shape = (
            message["role"],
            bool(message.get("content")),
            any(message.get(field) for field in REASONING_FIELDS) if len(message) > 2 else False,
            min(len(message.get("tool_calls") or ()), 2),
        )
        self.shapes.append(shape)
        said = frozenset(_searched(message, self.searched)) if self.searched is not None else frozenset()
        self.said.append(said)
        for string in sorted(said):
            self.order.pop((message["role"], *string), None)
            self.order[message["role"], *string] = None
        if message["role"] == "user":
            self.asked = said
        if self.distinct:
            for text in content_texts(message.get("content")):
                self.repeated = self.repeated or text.strip() in self.texts
                self.texts.add(text.strip())

    def key(self) -> tuple[Hashable, ...]:
        """Equal after histories that no steady template tells apart."""
        said = (*self.said[2:4], *self.said[-3:], self.asked, tuple(self.order))
        return (self.shapes[2][0], *self.shapes[-3:], min(len(self.shapes) - 3, 2), self.seen, self.since, said)


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
