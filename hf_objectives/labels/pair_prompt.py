"""The prompt of a preference row: given in its own column or shared by the two sides, said once or on each side again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hf_objectives.errors import FormatError
from hf_objectives.labels.sentinels import common_prefix

Message = dict[str, Any]
SIDES = ("chosen", "rejected")
LEADING = ("system", "developer")


def same_message(a: Any, b: Any) -> bool:
    """Whether two messages say the same, whatever they say about training and whichever keys an Arrow table made null."""
    if not isinstance(a, Mapping) or not isinstance(b, Mapping):
        return a == b
    said = [{k: v for k, v in one.items() if v is not None and k not in ("train", "weight")} for one in (a, b)]
    return said[0] == said[1]


def common_turns(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many messages two conversations have in common at their beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if not same_message(x, y)), min(len(a), len(b)))


def join_prompt(given: list[Message], sides: Sequence[list[Message]]) -> tuple[list[Message], list[list[Message]]]:
    """A prompt of its own and the answer of each side, which may repeat the prompt.

    Args:
        given: messages of the prompt.
        sides: messages of the chosen and of the rejected side: answers, or whole conversations that begin with the prompt
            (a system message that only the prompt or only the sides have aside).

    Returns:
        The prompt, with no assistant turn of it trained, and what comes after it on each side.

    Raises:
        FormatError: the two sides do not have this one prompt; says what each begins with.
    """
    skips = [_repeated(given, side) for side in sides]
    if bool(skips[0]) != bool(skips[1]):
        does, not_ = SIDES if skips[0] else SIDES[::-1]
        raise FormatError(f"{does} repeats the prompt and {not_} does not; expected one prompt for both sides")
    head = given
    if skips[0]:
        heads = [side[:skip] for side, skip in zip(sides, skips, strict=True)]
        if common_turns(*heads) < max(map(len, heads)):
            raise FormatError(
                f"prompts differ: chosen begins with {show(heads[0][0])} and rejected with {show(heads[1][0])}; "
                "expected one prompt for both sides"
            )
        if len(heads[0]) > len(given):  # with a system message that the prompt's column lacks
            head = heads[0]
    elif given and role_of(given[-1]) == "user":
        for name, side in zip(SIDES, sides, strict=True):
            if side and role_of(side[0]) in (*LEADING, "user"):
                raise FormatError(
                    f"prompts differ: the prompt ends with {show(given[-1])} and {name} begins with {show(side[0])}; "
                    "expected answers, or conversations that begin with the prompt"
                )
    untrained = [{**turn, "train": False} if role_of(turn) == "assistant" else turn for turn in head]
    return untrained, [side[skip:] for side, skip in zip(sides, skips, strict=True)]


def split_texts(chosen: str, rejected: str) -> int:
    """Where the answers begin in two texts that share a prompt: after their longest common prefix.

    Something is left of each side, and the space before a word goes with the word, as in TRL's `extract_prompt`.
    """
    at = max(0, min(common_prefix(chosen, rejected), len(chosen) - 1, len(rejected) - 1))
    differ = at < min(len(chosen), len(rejected)) and chosen[at] != rejected[at]
    return at - 1 if differ and chosen[:at].endswith(" ") else at


def role_of(message: Any) -> Any:
    """Role of a message, None of what is none."""
    return message.get("role") if isinstance(message, Mapping) else None


def show(message: Any) -> str:
    """A message in an error: whose it is and how it begins."""
    content = message.get("content") if isinstance(message, Mapping) else message
    return f"{role_of(message)} {content!r:.60}"


def _repeated(given: Sequence[Message], side: Sequence[Message]) -> int:
    """How many messages at the head of a side say the prompt again, 0 where it does not."""
    heads = [next((i for i, turn in enumerate(of) if role_of(turn) not in LEADING), len(of)) for of in (given, side)]
    if not all(heads):  # a system message on one of them only
        asked, said, extra = given[heads[0] :], side[heads[1] :], heads[1]
    else:
        asked, said, extra = given, side, 0
    again = bool(asked) and common_turns(asked, said) == len(asked)
    return len(asked) + extra if again else 0
