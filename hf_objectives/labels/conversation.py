"""Look at the turns of a conversation that is not checked yet: roles, leading system messages, what two have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Message = dict[str, Any]


def role_of(message: Any) -> Any:
    """Role of a message; None of what is no message."""
    return message.get("role") if isinstance(message, Mapping) else None


def show(message: Any) -> str:
    """A message in an error: its role and how it begins."""
    content = message.get("content") if isinstance(message, Mapping) else message
    return f"{role_of(message)} {content!r:.60}"


def num_leading(messages: Sequence[Any]) -> int:
    """How many system and developer messages stand before the first turn."""
    return next((i for i, turn in enumerate(messages) if role_of(turn) not in ("system", "developer")), len(messages))


def common_turns(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many messages two conversations have in common at their beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if not _same(x, y)), min(len(a), len(b)))


def _same(a: Any, b: Any) -> bool:
    """Whether two messages are equal but for what they say about training and for keys that an Arrow table made null."""
    if not isinstance(a, Mapping) or not isinstance(b, Mapping):
        return a == b
    x, y = ({k: v for k, v in turn.items() if v is not None and k not in ("train", "weight")} for turn in (a, b))
    return x == y
