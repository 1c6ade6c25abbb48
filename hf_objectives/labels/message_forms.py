"""The forms of one conversation that different templates take: content as text or blocks, arguments parsed or not."""

from __future__ import annotations

import json
from collections.abc import Callable

from hf_objectives.types import parse_json

#: Key of a message under which a ShareGPT `function_call` keeps the text that its author wrote.
CALL_TEXT = "call_text"

Form = Callable[[list[dict]], list[dict] | None]


def as_given(messages: list[dict]) -> list[dict] | None:
    """The conversation as its author wrote it."""
    return messages


def filled(messages: list[dict]) -> list[dict] | None:
    """Empty content beside tool calls, for templates that add to it (DeepSeek)."""
    changed = [message if "content" in message else {**message, "content": ""} for message in messages]
    return changed if changed != messages else None


def parsed(messages: list[dict]) -> list[dict] | None:
    """Arguments of tool calls as mappings, for templates that print them as JSON (Llama 3.1) or item by item (Qwen3.5)."""
    return _with_arguments(messages, lambda value: parse_json(value) if isinstance(value, str) else value)


def quoted(messages: list[dict]) -> list[dict] | None:
    """Arguments of tool calls as JSON text, for templates that add them to a string (DeepSeek)."""
    return _with_arguments(
        messages, lambda value: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    )


def quoted_filled(messages: list[dict]) -> list[dict] | None:
    """`quoted` and `filled`."""
    changed = quoted(messages)
    return changed and filled(changed)


def parsed_filled(messages: list[dict]) -> list[dict] | None:
    """`parsed` and `filled`."""
    changed = parsed(messages)
    return changed and filled(changed)


def blocks(messages: list[dict]) -> list[dict] | None:
    """Content as a list of text blocks, for the templates of multimodal models (Idefics, LLaVA)."""
    return _with_content(messages, str, lambda content: [{"type": "text", "text": content}])


def joined(messages: list[dict]) -> list[dict] | None:
    """Text blocks as one string, for templates that know no blocks.

    The texts follow each other without a separator, as templates that do know blocks print them (Qwen2.5-VL, SmolVLM).
    """
    return _with_content(messages, list, lambda content: "".join(block["text"] for block in content))


def written(messages: list[dict]) -> list[dict] | None:
    """ShareGPT function calls as the text that their author wrote, for templates that know no tool calls (SmolLM2)."""
    changed = [
        {"role": message["role"], "content": message[CALL_TEXT]} if CALL_TEXT in message else message
        for message in messages
    ]
    return changed if changed != messages else None


#: Tried in this order; the first is the conversation as it is.
FORMS: tuple[Form, ...] = (as_given, filled, parsed, parsed_filled, quoted, quoted_filled, blocks, joined, written)


def _with_content(messages: list[dict], kind: type, change: Callable) -> list[dict] | None:
    if not any(isinstance(message.get("content"), kind) for message in messages):
        return None
    return [
        {**message, "content": change(message["content"])} if isinstance(message.get("content"), kind) else message
        for message in messages
    ]


def _with_arguments(messages: list[dict], change: Callable) -> list[dict] | None:
    try:
        changed = [
            {**message, "tool_calls": [_call(call, change) for call in message["tool_calls"]]}
            if message.get("tool_calls")
            else message
            for message in messages
        ]
    except json.JSONDecodeError:
        return None  # arguments that are not JSON have no parsed form
    return changed if changed != messages else None


def _call(call: dict, change: Callable) -> dict:
    if "function" in call:
        return {**call, "function": _call(call["function"], change)}
    return {**call, "arguments": change(call["arguments"])} if "arguments" in call else call
