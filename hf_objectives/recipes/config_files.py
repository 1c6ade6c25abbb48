"""YAML files of options: found by path or name, with the line of each key, each value checked against its option."""

from __future__ import annotations

import json
import types
import typing
from argparse import Action, ArgumentTypeError
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from hf_objectives.errors import ConfigError, nearest
from hf_objectives.types import parse_yaml

CONFIGS = Path(__file__).parent / "configs"  # shipped with the package
LAUNCH_CONFIGS = Path(__file__).parent / "accelerate"  # of `accelerate launch`, shipped too


@dataclass(frozen=True)
class ConfigFile:
    """The keys and values of a YAML file, and the line of each key, from 1."""

    path: Path
    values: Mapping[str, Any]
    lines: Mapping[str, int]

    @classmethod
    def read(cls, path: Path) -> ConfigFile:
        """Read a file.

        Raises:
            ConfigError: it cannot be read, is not YAML, holds something else than keys and values, or a key twice.
        """
        try:
            text = path.read_text(encoding="utf-8")
            values = parse_yaml(text)
        except OSError as error:
            raise ConfigError(f"cannot read the config {path}: {error.strerror}") from error
        except ValueError as error:
            raise ConfigError(f"{path} is not valid YAML: {error}") from error
        if not isinstance(values, dict):
            raise ConfigError(f"{path} holds {type(values).__name__}; expected keys and values")
        node: Any = yaml.compose(text, yaml.SafeLoader)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if (first := lines.setdefault(key.value, line)) != line:
                raise ConfigError(f"{path}, line {line}: {key.value} stands on line {first} already; keep one of them")
        return cls(path, {str(key): value for key, value in values.items()}, lines)

    def place(self, key: str) -> str:
        """File and line of a key."""
        return f"{self.path}, line {self.lines[key]}" if key in self.lines else str(self.path)


def find_config(name: str, folder: Path = CONFIGS) -> Path:
    """The YAML file of that path, or the one of that name that is shipped in `folder`.

    Raises:
        ConfigError: there is none; names those that are shipped.
    """
    shipped = {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    if Path(name).is_file() or name not in shipped:
        if not Path(name).exists():
            raise ConfigError(
                f"cannot read the config {name}: no such file; shipped are {', '.join(shipped)}{nearest(name, shipped)}"
            )
        return Path(name)
    return shipped[name]


def option_value(value: Any, hint: Any, action: Action) -> Any:
    """A value of a YAML file as its option takes it.

    A mapping becomes JSON text, as on a command line. `1e-4`, which YAML reads as text, becomes a number. A `no`, which YAML
    reads as false, becomes text where the option knows it.

    Args:
        value: what the YAML says.
        hint: the type of the option's field.
        action: the option in its parser, which converts text.

    Raises:
        ValueError: the value is of another type; says which one is expected.
    """
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    known = {typing.get_origin(kind) or kind for kind in kinds}
    if value is None:
        fits = types.NoneType in known
    elif isinstance(value, Mapping):
        fits = bool(known & {dict, str, Mapping})
        value = json.dumps(value)
    elif isinstance(value, list):
        fits = list in known or action.nargs in ("+", "*")
    elif isinstance(value, str):
        return _of_text(value, action)
    elif isinstance(value, bool):
        texts = not known.isdisjoint({str}) or any(isinstance(kind, type) and issubclass(kind, Enum) for kind in known)
        fits = bool in known or texts
        if bool not in known and texts:
            return _of_text("no" if value is False and "no" in (action.choices or ()) else str(value).lower(), action)
    else:
        fits = type(value) in known or (isinstance(value, int) and float in known)
        if not fits and str in known:
            return _of_text(str(value), action)
    if not fits:
        raise ValueError(f"expected {_named(known)}")
    return value


def _of_text(text: str, action: Action) -> Any:
    """Text as the parser converts it."""
    try:
        made = action.type(text) if callable(action.type) else text
    except (ValueError, TypeError, ArgumentTypeError) as error:
        name = getattr(action.type, "__name__", "")
        raise ValueError(
            f"expected {name}" if isinstance(error, ValueError) and name in _PLAIN else str(error)
        ) from error
    if action.choices is not None and made not in action.choices:
        words = [str(choice) for choice in action.choices]
        raise ValueError(f"expected one of {', '.join(words)}{nearest(text, words)}")
    return [made] if action.nargs in ("+", "*") else made


_PLAIN = ("int", "float", "str")


def _named(known: set[Any]) -> str:
    names = ["nothing" if kind is types.NoneType else getattr(kind, "__name__", str(kind)) for kind in known]
    return " or ".join(sorted(names))
