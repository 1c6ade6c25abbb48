"""Constants, types and checks that every room shares."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import field
from typing import Any

from hf_objectives.errors import ConfigError, nearest

#: Label of a position that is not trained; the `ignore_index` of `torch.nn.functional.cross_entropy`.
IGNORE_INDEX = -100

#: One row of a dataset: a mapping of column names to values.
Row = Mapping[str, Any]


def option(default: Any, help: str, **metadata: Any) -> Any:
    """A field of a dataclass of options: its default, what `--help` says of it, and what else a parser wants to know."""
    return field(default=default, metadata={"help": help, **metadata})


def check_one_of(name: str, value: Any, known: Iterable[Any]) -> None:
    """Check that a setting has one of its known values.

    Example: `check_one_of("strategy", "bestfit", ("best_fit", "concat"))` raises "strategy is 'bestfit'; expected one
    of best_fit, concat; did you mean 'best_fit'?".

    Raises:
        ConfigError: `value` is not in `known`; names the setting, the value and the known values.
    """
    known = list(known)
    if value not in known:
        words = [str(word) for word in known if word is not None]
        raise ConfigError(f"{name} is {value!r}; expected one of {', '.join(words)}{nearest(str(value), words)}")


def check_keys(where: str, given: Iterable[Any], known: Iterable[str]) -> None:
    """Check that a mapping has known keys only.

    Raises:
        ConfigError: names every unknown key, each with the nearest known one.
    """
    known = list(known)
    unknown = [key for key in given if key not in known]
    if unknown:
        hints = (nearest(str(key), known).removeprefix("; ") for key in unknown)
        named = (f"{key!r} ({hint})" if hint else repr(key) for key, hint in zip(unknown, hints, strict=True))
        raise ConfigError(f"{where}: unknown key {', '.join(named)}; expected {', '.join(known)}")


def check_max_length(max_length: int | None) -> None:
    """Check a limit in tokens; None is no limit.

    Raises:
        ConfigError: `max_length` is under 2, so that no row has a token and a token that it predicts.
    """
    if max_length is not None and max_length < 2:
        raise ConfigError(f"max_length is {max_length}; expected at least 2, a token and the one that it predicts")


def ends_of_runs(labels: Any) -> Any:
    """Find where each run of trained tokens ends.

    Example: [-100, 5, 6, -100, 7] gives [False, False, True, False, True].

    Args:
        labels: int [..., length], a tensor or an array, -100 where a token is not trained.

    Returns:
        bool [..., length], True at the last token of each run.
    """
    trained = labels != IGNORE_INDEX
    ends = trained & True  # a copy
    ends[..., :-1] &= ~trained[..., 1:]
    return ends


def called_by(module: str, function: str | None = None) -> bool:
    """Whether a module, or one of its functions (its qualified name), is among the callers: hosts do not say who they are.

    A forked process still has the callers of its fork; a spawned one has none of them.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") == module and function in (None, frame.f_code.co_qualname):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False
