"""Arguments of a program: one YAML file, overridden by the command line. Every value knows where it came from."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, NoReturn, get_type_hints

import yaml

from hf_objectives.errors import ConfigError, FileFormatError, nearest
from hf_objectives.labels import EncodingConfig
from hf_objectives.recipes.config_files import ConfigFile, find_config, option_value
from hf_objectives.recipes.other_tools import SYNONYMS, tool_of
from hf_objectives.recipes.trl_keys import translate
from hf_objectives.types import parse_json

BUILT_IN = "builtin"  # the name of the built-in model, tokenizer and data
MIXTURE_KEYS = ("weight", "max_epochs")  # keys of a source that change no row
FRACTION = "fraction"  # key of a source, as in TRL: its share of the rows, none of them twice
COMMAND_LINE, DEFAULT = "command line", "default"
LAUNCHED = "HF_OBJECTIVES_LAUNCH_KEYS"  # names the keys of the YAML that started the launch, where one did


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

    `--config` takes the name of a shipped config too. `--print_config` prints what was given as YAML and ends the program.

    Args:
        classes: dataclasses; their fields are the known keys.
        argv: the arguments; None for those of the program.
        parser: a parser that has these fields as options; None for transformers' `HfArgumentParser`.

    Returns:
        One instance per class, and the origin of each value: "command line", the name of the YAML file, or "default".

    Raises:
        ConfigError: a YAML file that cannot be read; every unknown key and option (each with the nearest known one) and
            every value of another type, with file and line; or a value that a dataclass refuses.
    """
    before = ArgumentParser(add_help=False, allow_abbrev=False)
    before.add_argument("--config", nargs="?", const="")
    before.add_argument("--print_config", "--print-config", action="store_true")
    found, words = before.parse_known_args(sys.argv[1:] if argv is None else argv)
    if found.config == "":
        raise ConfigError("--config needs the path of a YAML file, or the name of a shipped one")
    if parser is None:
        from transformers import HfArgumentParser  # takes seconds to import

        parser = HfArgumentParser(list(classes), allow_abbrev=False)  # type: ignore[arg-type]
    parser.error = _refuse  # type: ignore[method-assign]
    file = ConfigFile.read(find_config(found.config)) if found.config else None
    options, problems = _words(words, parser)
    values, answers = _values(file, classes, parser, problems) if file else ({}, [])
    if problems:
        raise ConfigError("; ".join(problems))
    parser.set_defaults(**values)
    for action in parser._actions:
        action.required = action.required and action.dest not in values
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
        **dict.fromkeys(values, file.path.name if file else ""),
        **dict.fromkeys(options, COMMAND_LINE),
    }
    if answers and int(os.environ.get("RANK", "0")) == 0:
        print("\n".join(f"{file.path if file else ''}: {line}" for line in answers), file=sys.stderr)
    if found.print_config:
        print(_given(file, parsed, origin), end="")
        sys.exit()
    return built, origin


def _refuse(message: str) -> NoReturn:
    """What a parser does with an argument that it cannot take: an error of ours in place of usage lines of a page."""
    raise ConfigError(message)


def _words(words: Sequence[str], parser: ArgumentParser) -> tuple[set[str], list[str]]:
    """The names of the values that a command line sets, and what is wrong with its options."""
    names = {option: action.dest for action in parser._actions for option in action.option_strings}
    given, problems = set(), []
    for option in (word.split("=", 1)[0] for word in words if word.startswith("--")):
        if option in names:
            given.add(names[option])
        else:
            problems.append(f"unknown option {option}{_suggest(option, names)}")
    return given, problems


def _values(
    file: ConfigFile, classes: Sequence[type], parser: ArgumentParser, problems: list[str]
) -> tuple[dict[str, Any], list[str]]:
    """The values of a YAML file as the parser takes them, and answers about keys of TRL's; problems are added to `problems`.

    Raises:
        ConfigError: the config of another tool.
    """
    actions = {action.dest: action for action in reversed(parser._actions) if action.dest != "help"}
    if (tool := tool_of(file.values)) is not None:
        raise ConfigError(f"{file.path} is a config of {tool}; `hf-objectives convert {file.path}` writes ours")
    hints = {name: hint for cls in classes for name, hint in get_type_hints(cls).items()}
    done = os.environ.get(LAUNCHED, "").split(",")
    given = translate({key: value for key, value in file.values.items() if key not in done or key in actions}, actions)
    problems += [f"{file.place(key)}: {key}: {reason}" for key, reason in given.refusals.items()]
    values = {}
    for key, value in given.values.items():
        if key not in actions:
            hint = "; start the recipe with hf-objectives for it" if _is_launchers(key) else _suggest(key, actions)
            problems.append(f"{file.place(key)}: unknown key {key!r}{hint}")
            continue
        try:
            values[key] = option_value(value, hints[key], actions[key])
        except ValueError as error:
            problems.append(f"{file.place(given.places[key])}: {key} is {value!r}; {error}")
    return values, given.answers


def _is_launchers(key: str) -> bool:
    """Whether a key is an option of `accelerate launch`, or TRL's name for its file."""
    from accelerate.commands.launch import launch_command_parser

    return key in {"accelerate_config", *(action.dest for action in launch_command_parser()._actions)}


def _suggest(word: str, known: Collection[str]) -> str:
    """What may have been meant by an unknown key or option: a synonym of other tools before the nearest spelling."""
    key = word.removeprefix("--").replace("-", "_")
    other = SYNONYMS.get(key)
    if other is not None and {other, f"--{other}"} & {*known}:
        return f"; here it is {other!r}"
    return nearest(word, [name for name in known if name.startswith("--") == word.startswith("--")])


def _given(file: ConfigFile | None, parsed: Namespace, origin: Mapping[str, str]) -> str:
    """What was given, as the YAML that gives it again."""
    given = {key: source for key, source in origin.items() if source != DEFAULT}
    values = {
        key: file.values[key] if file and source != COMMAND_LINE and key in file.values else getattr(parsed, key)
        for key, source in given.items()  # one of TRL's keys has another name here
    }
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


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
