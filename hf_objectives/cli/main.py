"""`hf-objectives`: the command line. Commands look at data and runs; recipes train, here or through accelerate launch."""

from __future__ import annotations

import logging
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from importlib import import_module

from hf_objectives import __version__
from hf_objectives.cli.launch import run_recipe
from hf_objectives.cli.options import COMMANDS, make_parser, parse
from hf_objectives.cli.recipe_options import make_recipe_parser, read_table
from hf_objectives.errors import ConfigError, HFObjectivesError, nearest

_EXAMPLES = """
  hf-objectives sft --config quickstart
  hf-objectives sft --config recipe.yaml --num_processes 8 --config_file fsdp2
  hf-objectives inspect --dataset_name chats.jsonl --tokenizer folder --html labels.html
  hf-objectives diagnose runs/base --fail_on warning
  hf-objectives completion bash > ~/.local/share/bash-completion/completions/hf-objectives
"""
SHELLS = ("bash", "zsh", "tcsh")


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command. An error of ours, or of the file system, is one line on stderr and exit code 2."""
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        make_full_parser().print_help()
        return
    if words[0] == "--version":
        print(f"hf-objectives {__version__}")
        return
    try:
        code = run_command(words)
    except (HFObjectivesError, OSError) as error:  # a tokenizer that is not found, a folder that cannot be made
        print(f"{type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
        code = getattr(error, "exit_code", 2)
    if code:
        sys.exit(code)


def run_command(words: Sequence[str]) -> int | None:
    """Run a command, which comes before its arguments, and let its errors through; returns the exit code, None for 0."""
    name, *argv = words
    if (recipe := name.replace("-", "_")) in read_table()["recipes"]:
        return run_recipe(recipe, argv)
    if name == "completion":
        _complete(argv)
        return None
    if name not in COMMANDS:
        known = (*COMMANDS, *(recipe.replace("_", "-") for recipe in read_table()["recipes"]), "completion")
        raise ConfigError(f"unknown command {name!r}; expected one of {', '.join(known)}{nearest(name, known)}")
    options = parse(name, argv)
    return getattr(import_module(f"hf_objectives.cli.{COMMANDS[name][0]}"), name)(options)


def make_full_parser() -> ArgumentParser:
    """A parser that knows every command with its options, for `--help` and completion."""
    parser = ArgumentParser(
        "hf-objectives",
        description=__doc__,
        epilog=f"examples:{_EXAMPLES}",
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands, each with --help", metavar="COMMAND")
    for name, entry in read_table()["recipes"].items():
        commands.add_parser(
            name.replace("_", "-"), help=entry["doc"], parents=[make_recipe_parser(name)], add_help=False
        )
    for name, (_, options) in COMMANDS.items():
        commands.add_parser(name, help=(options.__doc__ or "").strip(), parents=[make_parser(name)], add_help=False)
    shells = commands.add_parser("completion", help="Print what completes commands and options in a shell.")
    shells.add_argument("shell", choices=SHELLS)
    return parser


def _complete(words: Sequence[str]) -> None:
    """Print the completion script of a shell."""
    import shtab

    if len(words) != 1 or words[0] not in SHELLS:
        raise ConfigError(f"completion: expected one of {', '.join(SHELLS)}")
    print(shtab.complete(make_full_parser(), shell=words[0]))
