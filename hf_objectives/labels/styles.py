"""The forms of one conversation that different templates take: content as text or blocks, arguments parsed or not."""

from __future__ import annotations

import json
from collections.abc import Callable

#: Key of a message under which a ShareGPT `function_call` keeps the text that its author wrote.
CALL_TEXT = "call_text"

Style = Callable[[list[dict]], list[dict] | None]


def as_given(messages: list[dict]) -> list[dict] | None:
    """The conversation as its author wrote it."""
    return messages


def filled(messages: list[dict]) -> list[dict] | None:
    """Empty content beside tool calls, for templates that add to it (DeepSeek)."""
    if all("content" in message for message in messages):
        return None
    return [message if "content" in message else {**message, "content": ""} for message in messages]


def parsed(messages: list[dict]) -> list[dict] | None:
    """Arguments of tool calls as mappings, for templates that print them as JSON (Llama 3.1) or item by item (Qwen3.5)."""
    return _with_arguments(messages, lambda value: json.loads(value) if isinstance(value, str) else value)


def quoted(messages: list[dict]) -> list[dict] | None:
    """Arguments of tool calls as JSON text, for templates that add them to a string (DeepSeek)."""
    return _with_arguments(
        messages, lambda value: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    )


def quoted_filled(messages: list[dict]) -> list[dict] | None:
    """`quoted` and `filled`."""
    styled = quoted(messages)
    return styled and filled(styled)


def parsed_filled(messages: list[dict]) -> list[dict] | None:
    """`parsed` and `filled`."""
    styled = parsed(messages)
    return styled and filled(styled)


def blocks(messages: list[dict]) -> list[dict] | None:
    """Content as a list of text blocks, for the templates of multimodal models (Idefics, LLaVA)."""
    if not any(isinstance(message.get("content"), str) for message in messages):
        return None
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        if isinstance(message.get("content"), str)
        else message
        for message in messages
    ]


def written(messages: list[dict]) -> list[dict] | None:
    """ShareGPT function calls as the text that their author wrote, for templates that know no tool calls (SmolLM2)."""
    if not any(CALL_TEXT in message for message in messages):
        return None
    return [
        {"role": message["role"], "content": message[CALL_TEXT]} if CALL_TEXT in message else message
        for message in messages
    ]


#: Tried in this order; the first is the conversation as it is.
STYLES: tuple[Style, ...] = (as_given, filled, parsed, parsed_filled, quoted, quoted_filled, blocks, written)


def _with_arguments(messages: list[dict], change: Callable) -> list[dict] | None:
    if not any(message.get("tool_calls") for message in messages):
        return None
    try:
        styled = [
            {**message, "tool_calls": [_call(call, change) for call in message["tool_calls"]]}
            if message.get("tool_calls")
            else message
            for message in messages
        ]
    except json.JSONDecodeError:
        return None  # arguments that are not JSON have no parsed form
    return styled if styled != messages else None


def _call(call: dict, change: Callable) -> dict:
    if "function" in call:
        return {**call, "function": _call(call["function"], change)}
    return {**call, "arguments": change(call["arguments"])} if "arguments" in call else call
