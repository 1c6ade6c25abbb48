"""Arguments of a recipe: one YAML file, overridden by the command line, every value with where it came from."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from hf_objectives.errors import ConfigError, FileFormatError, nearest

COMMAND_LINE, DEFAULT = "command line", "default"


def parse_config(classes: Sequence[type], argv: Sequence[str] | None = None) -> tuple[list[Any], dict[str, str]]:
    """Parse `--config file.yaml` and overrides into dataclasses, as transformers' own parser would.

    Args:
        classes: dataclasses whose fields are the known keys.
        argv: the arguments; the program's own by default.

    Returns:
        One instance per class, and where each value came from: "command line", the YAML's name, or "default".

    Raises:
        ConfigError: a YAML that cannot be read, an unknown key or option (with the nearest known one), or a value that
            a dataclass refuses.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    config, given = _take_config(given)
    parser = HfArgumentParser(list(classes))  # type: ignore[arg-type]
    known = {action.dest for action in parser._actions} - {"help"}
    values = _read_yaml(config) if config else {}
    for key in values:
        if key not in known:
            raise ConfigError(f"{config}: unknown key {key!r}{nearest(key, known)}")
    parser.set_defaults(**{key: _as_argument(value) for key, value in values.items()})
    for action in parser._actions:
        if action.dest in values:
            action.required = False
    typed = {option: action.dest for action in parser._actions for option in action.option_strings}
    on_line = set()
    for word in given:
        if word.startswith("--"):
            option = word.split("=", 1)[0]
            if option not in typed:
                known_options = [name for name in typed if name.startswith("--")]
                raise ConfigError(f"unknown option {option}{nearest(option, known_options)}")
            on_line.add(typed[option])
    try:
        parsed = parser.parse_args_into_dataclasses(args=given)
    except ConfigError:
        raise
    except (ValueError, TypeError) as error:
        raise ConfigError(str(error)) from error
    origin = {}
    for instance in parsed:
        for field in dataclasses.fields(instance):
            yaml_name = Path(config).name if config and field.name in values else DEFAULT
            origin[field.name] = COMMAND_LINE if field.name in on_line else yaml_name
    return list(parsed), origin


def _take_config(argv: list[str]) -> tuple[str | None, list[str]]:
    for i, word in enumerate(argv):
        if word == "--config":
            if i + 1 >= len(argv):
                raise ConfigError("--config needs the path of a YAML file")
            return argv[i + 1], argv[:i] + argv[i + 2 :]
        if word.startswith("--config="):
            return word.split("=", 1)[1], argv[:i] + argv[i + 1 :]
    return None, argv


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the config {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds {type(values).__name__}; expected keys and values")
    return values


def _as_argument(value: Any) -> Any:
    """A YAML value as the parser takes a default: mappings as JSON text; `1e-4`, a string to YAML, is parsed there."""
    return json.dumps(value) if isinstance(value, dict) else value


def named_sources(sources: str | None, dataset_name: str | None) -> Mapping[str, Any]:
    """Sources by name from `sources` (JSON) or the one `dataset_name`.

    Raises:
        ConfigError: none or both were given, or `sources` is not a mapping.
    """
    if bool(sources) == bool(dataset_name):
        raise ConfigError("give dataset_name or sources, one of the two")
    if not sources:
        assert dataset_name is not None
        return {Path(dataset_name).name.split(".")[0].strip("*-_") or "data": dataset_name}
    try:
        named = json.loads(sources)
    except json.JSONDecodeError as error:
        raise ConfigError(f"sources is not a mapping of names to paths ({error})") from error
    if not isinstance(named, dict) or not named:
        raise ConfigError("sources is not a mapping of names to paths")
    return named


def read_template(template: str | None) -> str | None:
    """A chat template, read where a .jinja file is named.

    Raises:
        FileFormatError: there is no such file.
    """
    if not template or not template.endswith(".jinja"):
        return template
    if not Path(template).exists():
        raise FileFormatError(f"chat_template names a file that does not exist: {template}")
    return Path(template).read_text(encoding="utf-8")
