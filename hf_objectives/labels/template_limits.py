"""What in a chat template pays from its budget: loops, calls, filters, tests, operators and texts that are joined.

`guarded` and `bound_*` give the filters, tests and functions of the environment; `template_bounds.py` rewrites a parsed
template. Short texts that are stripped, split or compared, the most common in templates, are free, so that an ordinary
template renders at the speed that it had.
"""

from __future__ import annotations

import functools
import re
import string
from collections.abc import Callable
from types import BuiltinMethodType
from typing import Any

from jinja2.runtime import LoopContext

from hf_objectives.errors import TemplateError
from hf_objectives.labels.template_bounds import COMPARED, JOIN, LOOP, PRINTED, TEXT
from hf_objectives.labels.template_budget import (
    CALL,
    MAX_BITS,
    SHORT,
    check_text,
    comparable,
    counted,
    joinable,
    looped,
    made,
    printable,
    size_of,
    spend,
)

_MAX_WIDTH = 10_000  # of a field that is padded


def _padded(value: Any, *args: Any, **kwargs: Any) -> int:
    numbers = [n for n in (*args, *kwargs.values()) if isinstance(n, int)]
    if any(abs(n) > _MAX_WIDTH for n in numbers):
        raise TemplateError(f"the chat template pads or repeats by over {_MAX_WIDTH:,}; expected a smaller number")
    lines = value.count("\n") + value.count("\t") if isinstance(value, str) else 0
    texts = [len(text) for text in (*args, *kwargs.values()) if isinstance(text, str)]
    return (lines + 1) * max((abs(n) for n in (*numbers, *texts)), default=8)


def _replaced(value: Any, old: Any = "", new: Any = "", *_: Any, **__: Any) -> int:
    value, old, new = str(printable(value)), str(printable(old)), str(printable(new))
    return value.count(old) * len(new)


def _text_joined(values: Any, separator: Any = "", *_: Any, **__: Any) -> int:
    if isinstance(values, (str, list, tuple, dict)):
        return size_of(values)[1] + len(values) * len(str(printable(separator)))
    return 0


def _method_joined(separator: Any, values: Any = (), *_: Any) -> int:
    return _text_joined(values, separator)


def _json(value: Any, *args: Any, indent: Any = None, separators: Any = (), **kwargs: Any) -> int:
    members, characters, depth = size_of(value)
    indent = args[1] if len(args) > 1 else indent
    width = len(indent) if isinstance(indent, str) else int(indent or 0)
    return characters + members * (width * depth + sum(map(len, args[2] if len(args) > 2 else separators or ())))


def _percent(value: Any, *args: Any, **kwargs: Any) -> int:
    if isinstance(value, (str, bytes)):
        text = value if isinstance(value, str) else value.decode("latin-1")
        if re.search(r"%(\([^)]*\))?[^a-zA-Z%]*(\*|\d{5})", text):
            raise TemplateError("the chat template formats a text to a width of five digits; expected a smaller one")
        return sum(size_of([args, kwargs])[:2]) * (1 + text.count("%("))
    return 0


def _formatted(value: Any, *args: Any, **kwargs: Any) -> int:
    fields = 0
    for _, field, width, _ in string.Formatter().parse(value):
        fields += field is not None
        if width and ("{" in width or re.search(r"\d{5}", width)):
            raise TemplateError("the chat template formats a text to a width of five digits; expected a smaller one")
    return sum(size_of([args, kwargs])[:2]) * fields


def _rounded(value: Any, *args: Any, **kwargs: Any) -> int:
    if any(isinstance(n, int) and abs(n) > 300 for n in (*args, *kwargs.values())):
        raise TemplateError("the chat template rounds to over 300 digits; expected fewer")
    return 0


def _refused(name: str) -> Callable[..., Any]:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise TemplateError(f"the chat template uses {name!r}, whose cost has no bound; expected a template without it")

    return refuse


#: How many characters a filter or method of that name adds at most, from its arguments; it may refuse them.
_GROWTH: dict[str, Callable[..., int]] = {
    **dict.fromkeys(
        ("center", "ljust", "rjust", "zfill", "expandtabs", "indent", "batch", "slice", "truncate"), _padded
    ),
    "replace": _replaced,
    "tojson": _json,
    "round": _rounded,
}
_METHODS: dict[str, Callable[..., Any]] = {
    **_GROWTH,
    "join": _method_joined,
    "format": _formatted,
    "format_map": _formatted,
}
_METHODS |= {name: _refused(name) for name in ("translate", "to_bytes", "maketrans")}
_FILTERS = {**_GROWTH, "join": _text_joined, "format": _percent}
_NO_FILTERS = ("urlize", "wordwrap", "xmlattr", "pprint", "striptags")
# These look at the members of a list, not into them.
_SHALLOW = frozenset("list select reject selectattr rejectattr map reverse batch slice items attr groupby".split())
_FREE_FILTERS = frozenset(("length", "count", "first", "last", "default", "d", "safe"))
_LIGHT = frozenset(("trim", "upper", "lower", "capitalize", "title", "string", "int", "float"))
_LAZY = frozenset(("list", "select", "reject", "selectattr", "rejectattr", "map", "join", "sum", "reverse", "unique"))
#: Methods of strings and dicts that chat templates call most.
_FREE = frozenset(
    (
        "strip lstrip rstrip split rsplit splitlines startswith endswith upper lower "
        "find title capitalize isdigit removeprefix removesuffix get items keys values"
    ).split()
)
#: Modules of the types whose methods a template may call. A NumPy array has methods that write files.
_PLAIN = frozenset(("builtins", "datetime", "jinja2", "markupsafe", "transformers"))


def guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that pays for what it reads and for what it makes."""
    if name in _LIGHT:  # takes a text and gives one that is no longer, or a number: the quickest way for most

        def light(value: Any, *args: Any, **kwargs: Any) -> Any:
            if type(value) is str and len(value) <= SHORT:
                return function(value, *args, **kwargs)
            size_of(value)
            return made(function(value, *args, **kwargs))

        return light
    growth, shallow, lazy = _FILTERS.get(name), name in _SHALLOW, name in _LAZY
    first = 0 if getattr(function, "jinja_pass_arg", None) is None else 1

    @functools.wraps(function)  # which also keeps what jinja2 marks its filters with
    def filtered(*args: Any, **kwargs: Any) -> Any:
        value = args[first] if len(args) > first else None
        if growth is None and type(value) is str and len(value) <= SHORT:
            return made(function(*args, **kwargs))
        spend(CALL)
        if type(value) is not str:
            if lazy and not isinstance(value, (list, tuple, dict)) and hasattr(value, "__iter__"):
                value = list(counted(value or ())) if name == "join" else looped(value)
                args = (*args[:first], value, *args[first + 1 :])
            elif isinstance(value, (list, tuple, dict, set)):
                if shallow:
                    spend(len(value))
                else:
                    size_of(value)
        if growth is not None:
            check_text(growth(*args[first:], **kwargs))
        return made(function(*args, **kwargs))

    return filtered


def is_free(function: Any) -> bool:
    """Whether a call is one of the common ones that make nothing longer than a short text: they need no care."""
    if type(function) is not BuiltinMethodType or function.__name__ not in _FREE:
        return False
    owner = function.__self__
    return type(owner) is dict or (type(owner) is str and len(owner) <= SHORT)


def called(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """The arguments of a call that a template makes, once it is paid for."""
    spend(CALL)
    if type(function) is LoopContext and args:
        return (looped(args[0]), *args[1:])
    owner = getattr(function, "__self__", None)
    if owner is None:
        wrapped = getattr(function, "__wrapped__", None)  # a `format` of the sandbox
        owner = getattr(wrapped, "__self__", None)
    if owner is not None:
        if type(owner).__module__.partition(".")[0] not in _PLAIN:
            raise TemplateError(
                f"the chat template calls a method of a {type(owner).__name__}; expected rows of plain JSON values"
            )
        growth = _METHODS.get(function.__name__) if isinstance(owner, (str, bytes, int)) else None
        if growth is not None:
            given = {name: value for name, value in kwargs.items() if name not in ("_loop_vars", "_block_vars")}
            check_text(growth(owner, *args, **given))
        for value in args:
            if type(value) is not str:
                comparable(value) if function.__name__ in ("index", "count") else printable(value)
    return args


def operate(operator: str, left: Any, right: Any) -> None:
    """Raise TemplateError where `*`, `**` or `%` would make a value that is too large."""
    spend(1)
    if operator == "%":
        check_text(_percent(left, right))
    elif operator == "**":
        if isinstance(left, int) and isinstance(right, int) and left.bit_length() * abs(right) > MAX_BITS:
            raise TemplateError(f"the chat template computes an integer of over {MAX_BITS:,} bits")
    elif isinstance(left, int) and isinstance(right, int):
        if left.bit_length() + right.bit_length() > MAX_BITS:
            raise TemplateError(f"the chat template computes an integer of over {MAX_BITS:,} bits")
    else:
        times, value = (left, right) if isinstance(left, int) else (right, left)
        if isinstance(times, int) and hasattr(value, "__len__"):
            check_text(len(value) * times)
            spend(max(0, len(value) * times) >> (5 if isinstance(value, (str, bytes)) else 0))


def bound_filters(filters: dict[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """The filters of an environment, each of which pays; and those that `Bounds` puts in."""
    own = {LOOP: looped, JOIN: made, TEXT: joinable, COMPARED: comparable, PRINTED: printable}
    refused = {name: _refused(name) for name in _NO_FILTERS}
    paying = {name: guarded(name, function) for name, function in filters.items() if name not in _FREE_FILTERS}
    return filters | paying | refused | own


def bound_tests(tests: dict[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """The tests of an environment; those that compare pay for lists."""

    def compared(test: Callable[..., Any]) -> Callable[..., Any]:
        def compare(left: Any, right: Any) -> Any:
            return test(comparable(left), right)

        return compare

    comparing = "== eq equalto != ne > gt greaterthan ge >= < lt lessthan <= le in".split()
    return tests | {name: compared(tests[name]) for name in comparing}


def bound_globals(values: dict[str, Any]) -> dict[str, Any]:
    """The functions that every template may call, without those that have no bound."""
    return values | {"lipsum": _refused("lipsum")}
