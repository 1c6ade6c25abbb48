"""Arguments of a program: one YAML file, overridden by the command line. Every value knows where it came from."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from hf_objectives.errors import ConfigError, FileFormatError, nearest
from hf_objectives.labels import EncodingConfig
from hf_objectives.types import check_keys, parse_json, parse_yaml

BUILT_IN = "builtin"  # the name of the built-in model, tokenizer and data
MIXTURE_KEYS = ("weight", "max_epochs")  # keys of a source that change no row
COMMAND_LINE, DEFAULT = "command line", "default"
CONFIGS = Path(__file__).parent / "configs"  # shipped with the package


@dataclass(kw_only=True)
class EncodingArguments(EncodingConfig):
    """`EncodingConfig` as options of a program; those that a command line cannot say are left out."""

    template_kwargs: ClassVar[Mapping[str, Any]] = {}  # type: ignore[misc]
    splits_documents: ClassVar[bool] = False  # type: ignore[misc]

    def encoding(self) -> EncodingConfig:
        """These options alone, as the functions that encode rows take them."""
        return EncodingConfig(**{f.name: getattr(self, f.name) for f in fields(EncodingConfig)})


def parse_config(
    classes: Sequence[type], argv: Sequence[str] | None = None, *, parser: ArgumentParser | None = None
) -> tuple[list[Any], dict[str, str]]:
    """Parse `--config file.yaml` and the options after it into dataclasses.

    Args:
        classes: dataclasses; their fields are the known keys.
        argv: the arguments; None for those of the program.
        parser: a parser that has these fields as options; None for transformers' `HfArgumentParser`.

    Returns:
        One instance per class, and the origin of each value: "command line", the name of the YAML file, or "default".

    Raises:
        ConfigError: a YAML file that cannot be read, an unknown key or option (with the nearest known one), or a value
            that a dataclass refuses.
    """
    before = ArgumentParser(add_help=False, allow_abbrev=False)
    before.add_argument("--config", nargs="?", const="")
    found, words = before.parse_known_args(sys.argv[1:] if argv is None else argv)
    if (config := found.config) == "":
        raise ConfigError("--config needs the path of a YAML file")
    if parser is None:
        from transformers import HfArgumentParser  # takes seconds to import

        parser = HfArgumentParser(list(classes))  # type: ignore[arg-type]
    values = _read_yaml(find_config(config)) if config else {}
    known = {action.dest for action in parser._actions} - {"help"}
    for key in values:
        if key not in known:
            raise ConfigError(f"{config}: unknown key {key!r}{nearest(key, known)}")
    # A mapping becomes JSON text, as on the command line. `1e-4`, which YAML reads as text, is parsed as a default.
    parser.set_defaults(**{key: json.dumps(v) if isinstance(v, dict) else v for key, v in values.items()})
    for action in parser._actions:
        action.required = action.required and action.dest not in values
    typed = _options_of(words, parser)
    parsed, left = parser.parse_known_args(words)
    if left:
        raise ConfigError(f"unexpected argument {left[0]!r}; expected --option value")
    try:
        built = [cls(**{f.name: getattr(parsed, f.name) for f in fields(cls) if f.init}) for cls in classes]
    except ConfigError:
        raise
    except (ValueError, TypeError) as error:
        raise ConfigError(str(error)) from error
    origin = {
        **{f.name: DEFAULT for cls in classes for f in fields(cls)},
        **dict.fromkeys(values, find_config(config).name if config else ""),
        **dict.fromkeys(typed, COMMAND_LINE),
    }
    return built, origin


def _options_of(words: Sequence[str], parser: ArgumentParser) -> set[str]:
    """The names of the values that a command line sets; an unknown option is an error."""
    names = {option: action.dest for action in parser._actions for option in action.option_strings}
    typed = set()
    for option in (word.split("=", 1)[0] for word in words if word.startswith("--")):
        if option not in names:
            raise ConfigError(f"unknown option {option}{nearest(option, [n for n in names if n.startswith('--')])}")
        typed.add(names[option])
    return typed


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


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the config {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds {type(values).__name__}; expected keys and values")
    return values


def read_mapping(name: str, text: str) -> dict[str, Any]:
    """Read an option whose value is a mapping as JSON text."""
    try:
        found = parse_json(text)
    except ValueError as error:
        raise ConfigError(f"{name} is not a mapping of names to paths ({error})") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{name} is not a mapping of names to paths")
    return found


def named_sources(sources: str | None, dataset_name: str | None) -> Mapping[str, Any]:
    """The sources by name: those of `sources` (JSON), or the one of `dataset_name`, named after its file."""
    if bool(sources) == bool(dataset_name):
        raise ConfigError("give dataset_name or sources, one of the two")
    if sources:
        if not (named := read_mapping("sources", sources)):
            raise ConfigError("sources is an empty mapping; expected names and paths")
        return named
    return {Path(str(dataset_name)).name.split(".")[0].strip("*-_") or "data": dataset_name}


def source_place(name: str, source: Any, split: str) -> tuple[str, str]:
    """The path and the split of a source that is a path, or a mapping with `path`; `split` where it names none."""
    given = source if isinstance(source, Mapping) else {"path": source}
    check_keys(f"source {name!r}", given, ("path", "split", *MIXTURE_KEYS))
    if not isinstance(path := given.get("path"), str):
        raise ConfigError(
            f"source {name!r} is {source!r}; expected a path, or a mapping with path (and split, weight, max_epochs)"
        )
    return path, str(given.get("split", split))


def read_template(template: str | None) -> str | None:
    """A chat template: the text of the .jinja file that is named, or the text itself."""
    if not template or not template.endswith(".jinja"):
        return template
    if not Path(template).exists():
        raise FileFormatError(f"chat_template names a file that does not exist: {template}")
    try:
        return Path(template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FileFormatError(f"chat_template {template} cannot be read ({error})") from error
