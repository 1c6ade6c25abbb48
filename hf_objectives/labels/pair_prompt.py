"""Find the prompt of a preference row: in its own column, or shared by both sides; a side may repeat it."""

from __future__ import annotations

from collections.abc import Sequence

from hf_objectives.errors import FormatError
from hf_objectives.labels.conversation import Message, common_turns, num_leading, role_of, show

SIDES = ("chosen", "rejected")


def join_prompt(prompt: list[Message], sides: Sequence[list[Message]]) -> tuple[list[Message], list[list[Message]]]:
    """Join a prompt with a column of its own and the answers of both sides, which may repeat the prompt.

    Args:
        prompt: messages of the prompt.
        sides: messages of the chosen and of the rejected side: answers, or whole conversations that begin with the prompt.
            A system message may stand in the prompt only, or in the sides only.

    Returns:
        The prompt, none of its assistant turns trained, and what comes after it on each side.

    Raises:
        FormatError: the two sides do not have this one prompt; says what each begins with.
    """
    skips = [_repeated(prompt, side) for side in sides]
    if bool(skips[0]) != bool(skips[1]):
        does, does_not = SIDES if skips[0] else SIDES[::-1]
        raise FormatError(f"{does} repeats the prompt and {does_not} does not; expected one prompt for both sides")
    head = prompt
    if skips[0]:
        heads = [side[:skip] for side, skip in zip(sides, skips, strict=True)]
        if common_turns(*heads) < max(map(len, heads)):
            raise FormatError(
                f"prompts differ: chosen begins with {show(heads[0][0])} and rejected with {show(heads[1][0])}; "
                "expected one prompt for both sides"
            )
        if len(heads[0]) > len(prompt):  # with a system message that the prompt's column lacks
            head = heads[0]
    elif prompt and role_of(prompt[-1]) == "user":
        for name, side in zip(SIDES, sides, strict=True):
            if side and role_of(side[0]) in ("system", "developer", "user"):
                raise FormatError(
                    f"prompts differ: the prompt ends with {show(prompt[-1])} and {name} begins with {show(side[0])}; "
                    "expected answers, or conversations that begin with the prompt"
                )
    untrained = [{**turn, "train": False} if role_of(turn) == "assistant" else turn for turn in head]
    return untrained, [side[skip:] for side, skip in zip(sides, skips, strict=True)]


def _repeated(prompt: Sequence[Message], side: Sequence[Message]) -> int:
    """How many messages at the beginning of a side repeat the prompt; 0 where it does not."""
    in_prompt, in_side = num_leading(prompt), num_leading(side)
    extra = 0
    if not (in_prompt and in_side):  # a system message on one of them only
        prompt, side, extra = prompt[in_prompt:], side[in_side:], in_side
    repeats = bool(prompt) and common_turns(prompt, side) == len(prompt)
    return len(prompt) + extra if repeats else 0


def split_texts(chosen: str, rejected: str) -> int:
    """Where the answers begin in two texts that share a prompt: after their longest common prefix.

    Something is left of each side, and the space before a word goes with the word, as in TRL's `extract_prompt`.
    """
    shortest = min(len(chosen), len(rejected))
    shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), shortest)
    split = max(0, min(shared, shortest - 1))
    differ = split < shortest and chosen[split] != rejected[split]
    return split - 1 if differ and chosen[:split].endswith(" ") else split
