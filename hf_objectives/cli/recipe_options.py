"""The options of the recipes from a table, so that `--help` and completion need no import of transformers.

`python -m hf_objectives.cli.option_table` writes the table; a test holds it to the live dataclasses.
"""

from __future__ import annotations

import contextlib
import json
import os
from argparse import ArgumentParser, HelpFormatter
from collections.abc import Mapping
from functools import cache
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("recipe_options.json")


@cache
def read_table() -> dict[str, Any]:
    """The table of the package: what each recipe does, which classes its options come from, and the options of each class."""
    return json.loads(TABLE.read_text(encoding="utf-8"))


@cache
def installed_table() -> dict[str, Any]:
    """The table of the installed releases. Where they are others than the package's, it is made once, which takes seconds."""
    versions = installed_versions()
    if read_table()["versions"] == versions:
        return read_table()
    folder = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser() / "hf_objectives"
    own = sha256(TABLE.read_bytes()).hexdigest()[:10]  # options of ours change it
    kept = folder / f"recipe_options-{own}-{'-'.join(versions.values())}.json"
    with contextlib.suppress(OSError, ValueError):
        return json.loads(kept.read_text(encoding="utf-8"))
    from hf_objectives.cli.option_table import live_table

    table = live_table()
    with contextlib.suppress(OSError):  # a cache that cannot be written costs those seconds each time
        folder.mkdir(parents=True, exist_ok=True)
        draft = kept.with_suffix(f".{os.getpid()}.draft")
        draft.write_text(json.dumps(table), encoding="utf-8")
        draft.replace(kept)
    return table


def installed_versions() -> dict[str, str]:
    """The releases that options come from, by package."""
    return {name: version(name) for name in ("transformers", "trl")}


def groups_of(recipe: str, table: Mapping[str, Any]) -> list[tuple[str, dict[str, dict[str, Any]]]]:
    """The options of a recipe in groups: a title, and the options by name."""
    classes = table["classes"]
    found = []
    for name, title in table["recipes"][recipe]["classes"].items():
        own = classes[name]["options"]
        found.append((title, own))
        if base := classes[name].get("base"):
            inherited = {key: option for key, option in classes[base]["options"].items() if key not in own}
            found.append(("The training, options of transformers.TrainingArguments", inherited))
    return found


def recipe_keys(recipe: str) -> set[str]:
    """The names of a recipe's options."""
    return {name for _, options in groups_of(recipe, installed_table()) for name in options}


def make_recipe_parser(recipe: str) -> ArgumentParser:
    """A parser for `--help` and for completion; the recipe itself parses by its dataclasses.

    It is of the package's table, which takes no import, and says so where other releases are installed.
    """
    epilog = "Options of accelerate launch (--num_processes 8, --config_file fsdp2 ...) start the recipe through it."
    if read_table()["versions"] != installed_versions():
        known, found = (
            " and ".join(f"{name} {number}" for name, number in versions.items())
            for versions in (read_table()["versions"], installed_versions())
        )
        epilog += f" These are the options under {known}; under {found}, which is installed, there may be others."
    command = recipe.replace("_", "-")
    parser = ArgumentParser(
        f"hf-objectives {command}",
        usage=f"hf-objectives {command} [--config FILE or NAME] [--option value ...] [options of accelerate launch]",
        description=read_table()["recipes"][recipe]["doc"],
        epilog=epilog,
        formatter_class=lambda prog: HelpFormatter(prog, max_help_position=32),
        allow_abbrev=False,
    )
    first = parser.add_argument_group("Where options come from")
    first.add_argument(
        "--config", metavar="FILE", help="YAML file, or the name of a shipped one; options come before it."
    )
    first.add_argument("--print_config", action="store_true", help="Print what was given as YAML, and end.")
    for title, options in groups_of(recipe, read_table()):
        group = parser.add_argument_group(title)
        for name, given in options.items():
            text = given["help"] + ("" if given["default"] is None else f" (default: {given['default']})")
            choices = given.get("choices")
            metavar = None if choices and len(choices) < 9 else "VALUE"
            group.add_argument(f"--{name}", help=text.replace("%", "%%"), choices=choices, metavar=metavar)
    return parser
