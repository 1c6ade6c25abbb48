"""Marks: private code points put into messages before they are rendered, and found again in the output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_objectives.labels.messages import CLOSE, OPEN, REASONING_FIELDS, RESERVED

#: First of the code points that mark the end of a text in message i (`END + i`), and the name of its tool call j
#: (`CALL + i`, then `NTH + j`).
END, CALL, NTH = 0x100000, 0x108000, 0x10E000


@dataclass(frozen=True, slots=True)
class Marks:
    """Where the marks of each message were found: positions in the clean text, and tool calls seen."""

    text: str
    positions: dict[int, list[int]]
    calls: dict[int, set[int]]

    def end(self, i: int) -> int | None:
        """Position just after the last marked text of message i, None where the template dropped it."""
        return self.positions[i][-1] if i in self.positions else None


def mark(messages: list[dict], only: int | None = None) -> list[dict]:
    """Messages with the end of each text marked by a private code point, `END + i` in message i.

    The mark stands before trailing white space, which templates strip or keep as they like. Names of tool calls are
    marked with `CALL + i` and `NTH + j` as well, so that a call that a template leaves out is seen.
    """
    return [_marked(message, i) if only in (None, i) else message for i, message in enumerate(messages)]


def read_marks(marked: str) -> Marks:
    """Take the marks out of a render: the clean text, and where each message's marks stood in it."""
    parts: list[str] = []
    positions: dict[int, list[int]] = {}
    calls: dict[int, set[int]] = {}
    at = length = 0
    called = -1
    for found in RESERVED.finditer(marked):
        if found.group() in (OPEN, CLOSE):
            continue
        parts.append(marked[at : found.start()])
        length += found.start() - at
        at = found.end()
        code = ord(found.group())
        if code >= NTH:
            # Templates name the tool again where they print its result: only the first time is the call itself.
            if code - NTH not in calls.setdefault(called, set()):
                calls[called].add(code - NTH)
                positions.setdefault(called, []).append(length)
        elif code >= CALL:
            called = code - CALL
        else:
            positions.setdefault(code - END, []).append(length)
    parts.append(marked[at:])
    return Marks("".join(parts), positions, calls)


def _marked(message: dict, i: int) -> dict:
    marked = dict(message)
    content = message.get("content")
    if isinstance(content, str):
        marked["content"] = _mark_text(content, i)
    elif content:
        marked["content"] = [{**block, "text": _mark_text(block["text"], i)} for block in content]
    for field in REASONING_FIELDS:
        if message.get(field):
            marked[field] = _mark_text(message[field], i)
    if message.get("tool_calls"):
        marked["tool_calls"] = [_mark_call(call, i, j) for j, call in enumerate(message["tool_calls"])]
    return marked


def _mark_text(text: str, i: int) -> str:
    core = text.rstrip()
    return core + chr(END + i) + text[len(core) :] if core else text


def _mark_call(call: Mapping, i: int, j: int) -> dict:
    if "function" in call:
        return {**call, "function": _mark_call(call["function"], i, j)}
    marked = {**call, "name": call["name"] + chr(CALL + i) + chr(NTH + j)}
    arguments = call.get("arguments")
    if isinstance(arguments, str):
        marked["arguments"] = _mark_text(arguments, i)
    elif arguments is not None:
        marked["arguments"] = _mark_leaves(arguments, i)
    return marked


def _mark_leaves(value: Any, i: int) -> Any:
    if isinstance(value, str):
        return _mark_text(value, i)
    if isinstance(value, Mapping):
        return {key: _mark_leaves(item, i) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_mark_leaves(item, i) for item in value]
    return value
