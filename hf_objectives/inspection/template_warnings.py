"""Find what a chat template does beside printing a conversation: text of its own, the date, tools that it leaves out."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from hf_objectives.errors import DataError
from hf_objectives.inspection.types import LabelWarning, WholeRow, warn
from hf_objectives.labels import (
    REASONING_FIELDS,
    ROLES,
    EncodingConfig,
    Example,
    Renderer,
    content_texts,
    marker_pattern,
    read_messages,
    read_tools,
    template_of,
)

_BLANK = "\U0010abcd"  # a private code point in place of what a message says
_ADDED_CHARACTERS = 12  # shorter text of a template is a role's name or a label
_ADDED_SHARE = 0.1  # of the rows that it could be in; rarer text comes from something in a message
_SHOWN = 160  # characters of a template's text
_SYSTEM = ("system", "developer")
_DAYS = datetime(2001, 2, 3, 4, 5, 6), datetime(2012, 11, 20, 17, 18, 19)  # no field of the one is the other's


@dataclass(slots=True)
class _Found:
    """What one template does, as the rows that show it."""

    rows: list[WholeRow] = field(default_factory=list)
    bare: set[int] = field(default_factory=set)  # positions of rows without a system message
    with_tools: list[WholeRow] = field(default_factory=list)
    added: defaultdict[str, list[WholeRow]] = field(default_factory=lambda: defaultdict(list))
    of_tools: defaultdict[str, list[WholeRow]] = field(default_factory=lambda: defaultdict(list))
    hidden: list[WholeRow] = field(default_factory=list)
    dated: list[WholeRow] = field(default_factory=list)


def template_warnings(rows: Sequence[WholeRow], tokenizer: Any, settings: EncodingConfig) -> Iterator[LabelWarning]:
    """Warnings of what chat templates do with rows that have messages, one of a kind for each template."""
    markers = marker_pattern(tokenizer)
    templates: defaultdict[str, _Found] = defaultdict(_Found)
    for row in rows:
        if row.example.messages:
            template = template_of(tokenizer, settings.chat_template, read_tools(row.example.tools))
            _look(row, templates[template], tokenizer, template, settings, markers)
    for found in templates.values():
        yield from _warnings_of(found)


def _warnings_of(found: _Found) -> Iterator[LabelWarning]:
    """What one template does: text that no message says, tools that it explains or leaves out, the date."""
    conversations, with_tools = len(found.rows), len(found.with_tools)
    # A system prompt of the template's own goes only into rows without one.
    if added := _common(
        found.added, lambda rows: len(found.bare) if {row.position for row in rows} <= found.bare else conversations
    ):
        ordered = sorted(added.items(), key=lambda item: -len(item[1]))
        words = ", ".join(f"{_short(piece)!r} into {len(rows):,}" for piece, rows in ordered)
        yield warn(
            "template_adds_text",
            "warning",
            f"the chat template writes {words} of {conversations:,} conversations; no message says so",
            "The model learns to expect it. Give the conversations a system message of their own, or change the template, "
            "unless it is used in the same way at inference.",
            _by_position(added),
        )
    if common := _common(found.of_tools, lambda rows: with_tools):
        concerned = _by_position(common)
        yield warn(
            "template_explains_tools",
            "info",
            f"beside the tools, the chat template writes {_short(' ... '.join(common))!r} into {len(concerned):,} of "
            f"{with_tools:,} conversations with tools",
            "Most templates explain tools in this way. Use the same template and tools at inference.",
            concerned,
        )
    if found.hidden:
        yield warn(
            "tools_not_shown",
            "warning",
            f"{len(found.hidden):,} of {with_tools:,} conversations with tools are rendered without them: the chat template "
            "does not print tools",
            "The model learns to call what it was not shown. Use a chat template that takes tools, or describe them in "
            "the system message.",
            found.hidden,
        )
    if found.dated:
        yield warn(
            "date_in_template",
            "warning",
            f"the chat template prints the date, so {len(found.dated):,} conversations show the day of their preparation",
            "Prepare the data on one day, or give the template a fixed date in template_kwargs if it takes one.",
            found.dated,
        )


def _look(
    row: WholeRow, found: _Found, tokenizer: Any, template: str, settings: EncodingConfig, markers: re.Pattern[str]
) -> None:
    """Render a row's conversation with its texts blanked, and book what is left of the render."""
    example, tools = row.example, read_tools(row.example.tools)
    kwargs = {**settings.template_kwargs, **example.template_kwargs}
    system = [message for message in example.messages if message.get("role") in _SYSTEM]
    found.rows.append(row)
    if not system:
        found.bare.add(row.position)
    pieces = _pieces(_render(Renderer(tokenizer, template, None, kwargs), example), markers)
    for piece in pieces:
        found.added[piece].append(row)
    if tools:
        found.with_tools.append(row)
        render = Renderer(tokenizer, template, tools, kwargs)
        text, names = _render(render, example), _names(tools)
        for piece in _pieces(text, markers, names):
            for known in pieces:
                piece = piece.replace(known, "").strip()
            if len(piece) >= _ADDED_CHARACTERS:
                found.of_tools[piece].append(row)
        told = "\n".join(part for message in system for part in content_texts(message.get("content")))
        if text is not None and not all(_stands_in(name, text + told) for name in names):
            found.hidden.append(row)
    if "strftime_now" in template:
        first, second = (
            _render(Renderer(tokenizer, template, tools, {"strftime_now": day.strftime, **kwargs}), example)
            for day in _DAYS
        )
        if first != second:
            found.dated.append(row)


def _common(
    rows_of: Mapping[str, list[WholeRow]], possible: Callable[[list[WholeRow]], int]
) -> dict[str, list[WholeRow]]:
    """The pieces of text that enough of the rows have that could have them."""
    common = {}
    for piece, rows in rows_of.items():
        could_have = possible(rows)
        if len(rows) >= max(min(2, could_have), _ADDED_SHARE * could_have):
            common[piece] = rows
    return common


def _by_position(rows_of: Mapping[str, list[WholeRow]]) -> list[WholeRow]:
    """The rows of several pieces, each once, in order."""
    rows = {row.position: row for rows in rows_of.values() for row in rows}
    return [rows[position] for position in sorted(rows)]


def _render(render: Renderer, example: Example) -> str | None:
    """A conversation with its texts blanked, without calls and their results; None where the template refuses that."""
    messages = []
    for message in read_messages(example.messages).messages:
        if message.get("role") == "tool" or message.get("tool_calls"):
            continue
        content = message.get("content")
        if isinstance(content, str):
            content = _BLANK
        elif content:
            content = [{**block, "text": _BLANK} for block in content]
        blanked = {**message, **({"content": content} if "content" in message else {})}
        messages.append({key: _BLANK if key in REASONING_FIELDS else value for key, value in blanked.items()})
    try:
        return render(messages)
    except DataError:  # a template that reads the text itself; the encoder has rendered the row as it is
        return None


def _names(tools: Sequence[Any]) -> set[str]:
    """Names of tools."""
    schemas = [tool.get("function", tool) for tool in tools if isinstance(tool, Mapping)]
    return {str(schema["name"]) for schema in schemas if isinstance(schema, Mapping) and schema.get("name")}


def _pieces(text: str | None, markers: re.Pattern[str], names: set[str] | frozenset[str] = frozenset()) -> list[str]:
    """The texts that a template prints around what is said, each once: no control tokens, role names or schemas."""
    pieces = []
    for part in re.split(f"{_BLANK}|{markers.pattern}", text or ""):
        lines = [line for line in part.strip().splitlines() if not _is_schema(line, names)]
        if lines and lines[0].strip().rstrip(":").lower() in ROLES:
            lines = lines[1:]
        piece = "\n".join(lines).strip()
        if len(piece) >= _ADDED_CHARACTERS and re.search(r"\w{3}", piece):
            pieces.append(piece)
    return list(dict.fromkeys(pieces))


def _is_schema(line: str, names: set[str] | frozenset[str]) -> bool:
    """Whether a line prints a tool: JSON, or with the name of one."""
    if any(_stands_in(name, line) for name in names):
        return True
    try:
        return isinstance(json.loads(line), (dict, list))
    except json.JSONDecodeError:
        return False


def _stands_in(name: str, text: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text) is not None


def _short(piece: str) -> str:
    return piece if len(piece) <= _SHOWN else f"{piece[: _SHOWN - 3]}..."
