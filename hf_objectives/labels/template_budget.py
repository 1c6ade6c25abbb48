"""The budget of one render of a chat template, and what the values that it makes and reads cost.

A template is a program of somebody else. The sandbox keeps it from Python's internals, but not from loops without an end or
texts without a bound. Here each loop, call, filter and joined text pays from a budget, so that a template either renders or
ends in a `TemplateError`, in any thread or process. `template_limits.py` says what pays.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import jinja2

from hf_objectives.errors import TemplateError

MAX_TEMPLATE = 1 << 18  # characters of a template; the longest in use has 40,000
MAX_TEXT = 1 << 24  # characters of one text, the render of a conversation among them
MAX_STEPS = 10_000_000  # a pass through a loop is one, as are 32 characters of a text that is made; a call is CALL
MAX_SECONDS = 30.0  # of the thread's processor time, for what steps do not count, such as comparisons of long texts
MAX_BITS = 1 << 16  # of an integer
_MAX_COMPARED = 10_000  # members of a value that is compared with another
SHORT = 1024  # characters of a text that costs nothing but the step it is made in
CALL = 8  # steps of a call or filter
JOINED = 32  # pieces of a render that are made before they are counted
_BETWEEN_CHECKS = 64  # steps between looks at the clock


class _Budget(threading.local):
    """Of this thread's render: steps left, steps left at the next look at the clock, time of the first look."""

    def __init__(self) -> None:
        self.now: list[Any] = [MAX_STEPS, 0, None]


_budget = _Budget()


def begin() -> None:
    """Give this thread the whole budget, for one render."""
    _budget.now = [MAX_STEPS, MAX_STEPS - _BETWEEN_CHECKS, None]


def spend(steps: int) -> None:
    """Take steps from the budget of this thread.

    Raises:
        TemplateError: none are left, or the time is up.
    """
    budget = _budget.now
    budget[0] -= steps
    if budget[0] < budget[1]:
        _check(budget)


def _check(budget: list[Any]) -> None:
    left, _, began = budget
    if left < 0:
        raise TemplateError(
            f"the chat template takes over {MAX_STEPS:,} steps for one conversation; expected loops and texts in proportion "
            "to the messages. Mend the template, or split the conversation"
        )
    now = time.thread_time()
    if began is None:
        budget[2] = now
    elif now - began > MAX_SECONDS:
        raise TemplateError(
            f"the chat template takes over {MAX_SECONDS:.0f} seconds for one conversation; mend it, or split the conversation"
        )
    budget[1] = left - _BETWEEN_CHECKS


def check_text(length: int) -> None:
    """Raise TemplateError where a text of `length` characters is too long."""
    if length > MAX_TEXT:
        raise TemplateError(
            f"the chat template makes a text of over {MAX_TEXT:,} characters; mend it, or split the conversation"
        )


def joined(pieces: Iterable[str]) -> str:
    """The pieces of a render as one text, in bounded memory."""
    pieces = iter(pieces)
    kept = list(islice(pieces, JOINED))
    if len(kept) == JOINED:
        length, some = sum(map(len, kept)), kept
        while len(some) == JOINED:
            check_text(length)
            some = list(islice(pieces, JOINED))
            kept += some
            length += sum(map(len, some))
    text = "".join(kept)
    if len(text) > MAX_TEXT:
        check_text(len(text))
    return text


# -- what each part of a template pays -------------------------------------------------------------------------------


def made(value: Any) -> Any:
    """A value that a template has made, once it is paid for; short texts are free, as most are short."""
    if type(value) is str and len(value) <= SHORT:
        return value
    if isinstance(value, str):
        if len(value) > MAX_TEXT:
            check_text(len(value))
        spend(1 + (len(value) >> 5))
    elif isinstance(value, int):
        if value.bit_length() > MAX_BITS:
            raise TemplateError(f"the chat template computes an integer of over {MAX_BITS:,} bits")
        spend(1)
    else:
        spend(1 + (len(value) if isinstance(value, (list, tuple, dict, bytes)) else 0))
    return value


def size_of(value: Any) -> tuple[int, int, int]:
    """Members, characters and depth of a value as it is printed: what stands in it twice counts twice."""
    members = characters = depth = 0
    level = [value]
    while level:
        depth += 1
        members += len(level)
        below: list[Any] = []
        for item in level:
            if isinstance(item, (str, bytes)):
                characters += len(item)
            elif isinstance(item, dict):
                below += item.keys()
                below += item.values()
            elif isinstance(item, (list, tuple, set, frozenset)):
                below += item
            if len(below) + members + characters > MAX_TEXT:
                check_text(MAX_TEXT + 1)
        level = below
    spend(members + (characters >> 5))
    return members, characters, depth


def printable(value: Any) -> Any:
    """A value that is about to be printed; members of lists that stand there many times are what to fear."""
    if type(value) is not str and isinstance(value, (list, tuple, dict, set)):
        size_of(value)
    return value


def joinable(value: Any) -> Any:
    """A value that `~` makes a text of, once it is paid for."""
    return made(printable(value))


def comparable(value: Any) -> Any:
    """A value that is about to be compared with another."""
    if type(value) is str and len(value) <= SHORT:
        return value
    spend(1)
    if isinstance(value, (list, tuple, dict, set)) and size_of(value)[0] > _MAX_COMPARED:
        raise TemplateError(f"the chat template compares values of over {_MAX_COMPARED:,} members")
    return value


def gathered(pieces: Iterable[str]) -> str:
    """What a macro or a block has gathered, as one text."""
    return made(joined(pieces))


class _Counted:
    """A long sequence whose members are paid for one by one, so that a loop that is left early pays for no more."""

    def __init__(self, values: Iterable[Any]) -> None:
        self._values = values

    def __len__(self) -> int:
        return len(self._values)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        return counted(self._values)


def counted(values: Iterable[Any]) -> Iterator[Any]:
    """The values, each paid for as it is taken."""
    for value in values:
        spend(1)
        yield value


def looped(values: Any) -> Any:
    """What a loop goes through."""
    if type(values) is list and len(values) <= _BETWEEN_CHECKS:
        spend(1 + len(values))
        return values
    if isinstance(values, (str, jinja2.Undefined)) or not hasattr(values, "__iter__"):
        spend(1 + (len(values) if isinstance(values, str) else 0))
        return values
    return _Counted(values) if hasattr(values, "__len__") else counted(values)
