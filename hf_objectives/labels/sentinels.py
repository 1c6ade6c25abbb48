"""Sentinels: private code points put into messages before they are rendered, and found again in the output.

They tell where a template prints what: `<u>Hi</s>` rendered from a message `Hi` with sentinels reads `<u>[Hi]</s>`, where
`[` and `]` stand for two private code points that carry the number of the message.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_objectives.errors import ConversationError
from hf_objectives.labels.messages import CLOSE, OPEN, REASONING_FIELDS, RESERVED

#: First code points of the four kinds: the end and the begin of a text of message i (`END + i`, `BEGIN + i`), and the name
#: of its tool call j (`CALL + i`, then `NTH + j`).
END, BEGIN, CALL, NTH = 0x100000, 0x104000, 0x108000, 0x10E000
_MOST_MESSAGES = BEGIN - END


@dataclass(frozen=True, slots=True)
class Sentinels:
    """Where the sentinels of each message were found, as positions in the render without them.

    Attributes:
        text: the render without sentinels.
        ends: the ends of the texts of each message, in order; a message that was not printed has none.
        begins: where the first text of a message begins.
        calls: the tool calls that were printed, per message.
    """

    text: str
    ends: dict[int, list[int]]
    begins: dict[int, int]
    calls: dict[int, set[int]]

    def end(self, i: int) -> int | None:
        """Position just after the last text of message i, None where the template dropped it."""
        return self.ends[i][-1] if i in self.ends else None

    def last_end(self) -> int:
        """Position just after the last text of any message."""
        return max(positions[-1] for positions in self.ends.values())


def mark(messages: list[dict], only: range | None = None, *, begins: bool = False) -> list[dict]:
    """Messages with a sentinel at the end of each text, before trailing white space, which templates may strip.

    Names of tool calls get sentinels of their own, so that a call that a template leaves out is seen.

    Args:
        messages: the conversation.
        only: which messages get sentinels; None for all.
        begins: put a sentinel at the begin of contents and reasoning, too.

    Raises:
        ConversationError: more messages than there are code points for.
    """
    if len(messages) > _MOST_MESSAGES:
        raise ConversationError(f"{len(messages):,} messages; expected at most {_MOST_MESSAGES:,}")
    return [_marked(message, i, begins) if only is None or i in only else message for i, message in enumerate(messages)]


def read_sentinels(marked: str) -> Sentinels:
    """Take the sentinels out of a render, and say where they stood."""
    parts: list[str] = []
    ends: dict[int, list[int]] = {}
    begins: dict[int, int] = {}
    calls: dict[int, set[int]] = {}
    place = length = 0
    called = -1
    for found in RESERVED.finditer(marked):
        char = found.group()
        if char in (OPEN, CLOSE):
            continue
        begin = found.start()
        parts.append(marked[place:begin])
        length += begin - place
        place = begin + 1
        code = ord(char)
        if code < BEGIN:
            ends.setdefault(code - END, []).append(length)
        elif code < CALL:
            begins.setdefault(code - BEGIN, length)
        elif code < NTH:
            called = code - CALL
        elif code - NTH not in calls.setdefault(called, set()):
            # Templates name the tool again where they print its result: only the first time is the call itself.
            calls[called].add(code - NTH)
            ends.setdefault(called, []).append(length)
    parts.append(marked[place:])
    return Sentinels("".join(parts), ends, begins, calls)


def _marked(message: dict, i: int, begins: bool) -> dict:
    marked = dict(message)
    content = message.get("content")
    begin = chr(BEGIN + i) if begins else ""
    if isinstance(content, str):
        marked["content"] = _mark_text(content, begin, i)
    elif content:
        marked["content"] = [{**block, "text": _mark_text(block["text"], begin, i)} for block in content]
    if len(message) > 2:
        for field in REASONING_FIELDS:
            if message.get(field):
                marked[field] = _mark_text(message[field], begin, i)
        if message.get("tool_calls"):
            marked["tool_calls"] = [_mark_call(call, i, j) for j, call in enumerate(message["tool_calls"])]
    return marked


def _mark_text(text: str, begin: str, i: int) -> str:
    core = text.rstrip()
    if not core:
        return text
    lead = len(core) - len(core.lstrip()) if begin else 0
    return f"{core[:lead]}{begin}{core[lead:]}{chr(END + i)}{text[len(core) :]}"


def _mark_call(call: Mapping, i: int, j: int) -> dict:
    if "function" in call:
        return {**call, "function": _mark_call(call["function"], i, j)}
    marked = {**call, "name": call["name"] + chr(CALL + i) + chr(NTH + j)}
    if call.get("arguments") is not None:
        marked["arguments"] = _mark_leaves(call["arguments"], i)
    return marked


def _mark_leaves(value: Any, i: int) -> Any:
    if isinstance(value, str):
        return _mark_text(value, "", i)
    if isinstance(value, Mapping):
        return {key: _mark_leaves(item, i) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_mark_leaves(item, i) for item in value]
    return value


# -- how far two renders agree -------------------------------------------------------------------------------------------


def common_prefix(a: str, b: str) -> int:
    """Length of the longest common prefix of two strings."""
    return bisect_right(range(1, min(len(a), len(b)) + 1), False, key=lambda n: a[:n] != b[:n])


def agreement(a: str, b: str) -> tuple[int, int]:
    """How far two strings say the same, white space aside: the length of that part of each.

    Example: `agreement("</call>\\n<end>", "</call> <end>!")` is (13, 13).
    """
    i = j = in_a = in_b = 0
    while i < len(a) and j < len(b):
        if a[i] == b[j]:
            i, j = i + 1, j + 1
            in_a, in_b = i, j
        elif a[i].isspace():
            i += 1
        elif b[j].isspace():
            j += 1
        else:
            break
    return in_a, in_b


def whole(markers: re.Pattern[str], text: str, cut: int) -> int:
    """`cut`, moved back to the start of the control token that it would split."""
    begin = max(0, cut - 100)
    for found in markers.finditer(text, begin, min(len(text), cut + 100)):
        if found.start() < cut < found.end():
            return found.start()
    return cut
