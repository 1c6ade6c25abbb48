"""Generated conversations: systems, several users in a row, tool calls, reasoning, train flags, odd endings."""

from __future__ import annotations

import random
from typing import Any

_TEXTS = (
    "Hello", "What is 2+2?", " spaces around \n", "two\n\nparagraphs", "a/nothink", "see <think> here", "x</think>y",
    "<tool_response>\nok\n</tool_response>", "ünïcödé 日本", 'quoted "text" \\ here', "<b>bold</b>", "user", "1", "four.",
    "<think>\nhm\n</think>\n\nFour.", "[INST]", "It's", "/think", "no_think /no_think", "{'a': 1}",
)  # fmt: skip
_ARGUMENTS: tuple[Any, ...] = (
    {"city": "Paris"}, {}, {"n": 3, "deep": {"a": [1, "x", None]}}, {"line": 12, "path": "a.py"}, {"flag": True},
)  # fmt: skip


def conversation(random: random.Random, *, tools: bool, reasoning: bool, longest: int = 12) -> list[dict[str, Any]]:
    """A conversation that most templates take: turns of user and assistant, calls answered by tools."""
    messages: list[dict[str, Any]] = []
    if random.random() < 0.4:
        messages.append({"role": "system", "content": _text(random)})
    if random.random() < 0.05:
        messages.append(_assistant(random, reasoning))
    while len(messages) < random.randint(2, longest):
        messages += [{"role": "user", "content": _text(random)} for _ in range(1 + (random.random() < 0.07))]
        while tools and random.random() < 0.5:
            messages += _call(random, reasoning)
        if random.random() < 0.97:
            messages.append(_assistant(random, reasoning))
    if random.random() < 0.1:
        messages.append({"role": "user", "content": _text(random)})
    if tools and random.random() < 0.1:
        messages += _call(random, reasoning)[:1]
    return messages


def _text(random: random.Random) -> str:
    return random.choice(_TEXTS) if random.random() < 0.5 else f"plain text number {random.randrange(1000)}"


def _assistant(random: random.Random, reasoning: bool) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": _text(random)}
    if reasoning and random.random() < 0.5:
        message["reasoning_content"] = _text(random)
    if random.random() < 0.15:
        message["train"] = False
    return message


def _call(random: random.Random, reasoning: bool) -> list[dict[str, Any]]:
    message = _assistant(random, reasoning)
    if random.random() < 0.7:
        message["content"] = ""
    calls = [
        {
            "id": f"call{random.randrange(10**5):05}",
            "type": "function",
            "function": {"name": random.choice(("get_weather", "run")), "arguments": random.choice(_ARGUMENTS)},
        }
        for _ in range(1 + (random.random() < 0.2))
    ]
    answers = [
        {"role": "tool", "name": c["function"]["name"], "tool_call_id": c["id"], "content": _text(random)}
        for c in calls
    ]
    return [{**message, "tool_calls": calls}, *answers]
