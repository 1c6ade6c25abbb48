"""A recipe by its name: in this process, or through `accelerate launch` where its options or several devices ask for it."""

from __future__ import annotations

import os
import subprocess
from argparse import SUPPRESS, ArgumentParser
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from hf_objectives.cli.recipe_options import make_recipe_parser, recipe_keys
from hf_objectives.errors import ConfigError
from hf_objectives.recipes import LAUNCH_CONFIGS, LAUNCHED, ConfigFile, find_config

_OWN = ("config", "print_config", "help")  # options of every recipe
_FILE, _TRL_FILE = "config_file", "accelerate_config"  # the launcher's file, here and in TRL


def run_recipe(recipe: str, words: Sequence[str]) -> int | None:
    """Run a recipe with these options, its own and those of `accelerate launch`; returns the exit code, None for 0.

    The launcher's options may stand in the YAML of `--config` too, as in TRL's. Its `--config_file` takes a file, or the name
    of one that is shipped: fsdp2, zero3, multi_gpu ...

    Raises:
        ConfigError: options of the launcher in a process that was launched already.
    """
    if {"-h", "--help"} & {*words}:
        make_recipe_parser(recipe).print_help()
        return None
    known = {*recipe_keys(recipe), *_OWN}
    keys = {key: value for key, value in _yaml_of(words).items() if key not in known}
    names = {word.split("=", 1)[0].removeprefix("--").replace("-", "_") for word in words if word.startswith("--")}
    options: dict[str, Any] = {}
    if keys or names - known:
        keys, options, words = _split(keys, words, known)
    if options and "LOCAL_RANK" in os.environ:
        first = next(name for name in options if name != "nondefault")  # accelerate's list of what was given
        raise ConfigError(f"{first} is for accelerate launch, which started this process; give it there")
    if not options and ("LOCAL_RANK" in os.environ or _one_device()):
        from hf_objectives.distributed import leave_group  # imports torch

        try:
            import_module(f"hf_objectives.recipes.{recipe}").main(words)
        finally:
            leave_group()
        return None
    return _launch(["--module", "hf_objectives.recipes", recipe, *words], options, keys)


def _yaml_of(words: Sequence[str]) -> Mapping[str, Any]:
    before = ArgumentParser(add_help=False, allow_abbrev=False)
    before.add_argument("--config", nargs="?")
    config = before.parse_known_args(words)[0].config
    return ConfigFile.read(find_config(config)).values if config else {}


def _split(
    keys: Mapping[str, Any], words: Sequence[str], known: set[str]
) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """The launcher's keys of a YAML, the launcher's options as given there and in words, and the words that are left."""
    from accelerate.commands.launch import launch_command_parser  # takes seconds to import

    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.error = _refuse  # type: ignore[method-assign]
    parser.add_argument(f"--{_TRL_FILE}", dest=_FILE, default=SUPPRESS)
    for action in launch_command_parser()._actions:
        # The recipe's own options come first: gradient_accumulation_steps, debug. Short ones are not for here.
        action.option_strings = [name for name in action.option_strings if name.startswith("--")]
        if action.option_strings and action.dest not in known | {"module", "no_python"}:
            action.default = SUPPRESS
            parser._add_action(action)
    flags = {name.removeprefix("--"): action.nargs == 0 for action in parser._actions for name in action.option_strings}
    ours = {key: value for key, value in keys.items() if key in flags}
    given = [
        f"--{key}" if flags[key] else f"--{key}={'no' if value is False else value}"  # which YAML reads as false
        for key, value in ours.items()
        if value or not flags[key]
    ]
    found, left = parser.parse_known_args([*given, *words])
    options = vars(found)
    if _FILE in options:
        options[_FILE] = str(find_config(options[_FILE], LAUNCH_CONFIGS))
    return ours, options, left


def _refuse(message: str) -> NoReturn:
    raise ConfigError(f"accelerate launch: {message}")


def _one_device() -> bool:
    """Whether `accelerate launch` without options would start one process: no more devices, no config of its own."""
    import torch
    from accelerate.commands.config.config_args import default_config_file

    return torch.accelerator.device_count() <= 1 and not Path(default_config_file).is_file()


def _launch(words: Sequence[str], options: Mapping[str, Any], keys: Mapping[str, Any]) -> int | None:
    import torch
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    args = launch_command_parser().parse_args(words)
    vars(args).update(options)
    if (args.num_processes or 1) > 1 and not torch.accelerator.is_available() and not _says_how(args):
        args.multi_gpu = True  # which starts processes on CPUs too; without it accelerate starts one
    os.environ[LAUNCHED] = ",".join(keys)
    try:
        launch_command(args)
    except subprocess.CalledProcessError as error:  # the recipe has said why
        return error.returncode
    except ChildFailedError as error:
        return error.get_first_failure()[1].exitcode
    return None


def _says_how(args: Any) -> bool:
    """Whether the launcher's options or its file say how several processes work together."""
    if args.use_fsdp or args.use_deepspeed or args.use_megatron_lm:
        return True
    return (
        bool(args.config_file) and ConfigFile.read(Path(args.config_file)).values.get("distributed_type", "NO") != "NO"
    )
