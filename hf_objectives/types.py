"""Constants, types and checks that every room shares."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import field
from typing import Any

import yaml

from hf_objectives.errors import ConfigError, nearest

#: Label of a position that is not trained; the `ignore_index` of `torch.nn.functional.cross_entropy`.
IGNORE_INDEX = -100

#: One row of a dataset: a mapping of column names to values.
Row = Mapping[str, Any]


#: How deep lists and mappings of a file of others may stand in each other. Programs that walk them call themselves as deep.
MAX_DEPTH = 100
TOO_DEEP = f"lists or mappings stand over {MAX_DEPTH} deep in each other"
#: How many values a YAML file may stand for: its aliases can name a list twice, that list another twice, and so on.
MAX_VALUES = 1_000_000


def parse_json(text: str | bytes) -> Any:
    """A JSON value, of text that a stranger may have written.

    Raises:
        ValueError: the text is not JSON or not UTF-8, stands over MAX_DEPTH deep, or holds an integer with more digits than
            Python reads. The message is one line.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte 0x{error.object[error.start]:02x} at {error.start})") from error
    except json.JSONDecodeError:
        raise
    except ValueError as error:  # over 4,300 digits
        raise ValueError(f"an integer of over {sys.get_int_max_str_digits():,} digits") from error
    check_depth(value)
    return value


def parse_yaml(text: str) -> Any:
    """A YAML value, of text that a stranger may have written.

    Raises:
        ValueError: the text is not YAML, stands over MAX_DEPTH deep, or stands for over MAX_VALUES values.
    """
    try:
        value = yaml.safe_load(text)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        # The others are of dates, numbers and keys that YAML takes for such and Python does not.
        raise ValueError(" ".join(str(error).split())) from error
    check_depth(value)
    return value


def check_depth(value: Any) -> None:
    """Raise a ValueError where lists and mappings stand over MAX_DEPTH deep in each other, or hold over MAX_VALUES values
    that stand in several places."""
    level, ids, depth, shared = [value], set[int](), 0, 0
    while level := [item for item in level if isinstance(item, (dict, list, tuple))]:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(TOO_DEEP)
        below: list[Any] = []
        for item in level:
            shared += len(item) if id(item) in ids else 0
            ids.add(id(item))
            below += item.values() if isinstance(item, dict) else item
            if shared > MAX_VALUES:
                raise ValueError(f"aliases stand for over {MAX_VALUES:,} values")
        level = below


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
