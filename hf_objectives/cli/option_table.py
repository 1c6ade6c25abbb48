"""Write the table of the recipes' options, from their dataclasses: `python -m hf_objectives.cli.option_table`."""

from __future__ import annotations

import json
from argparse import Action
from importlib import import_module
from typing import Any

from transformers import HfArgumentParser, TrainingArguments
from trl import ModelConfig

from hf_objectives.cli.recipe_options import TABLE, installed_versions

TITLES = (
    "The rows and what is done with them",
    "The model",
    "The objective, and the training where it differs from transformers",
)
#: Recipes, each a module of `hf_objectives.recipes` with a `main`.
RECIPES = ("pretrain", "sft", "distill", "reward", "dpo", "ppo", "stack", "mixture_search")


def live_table() -> dict[str, Any]:
    """The table as the dataclasses are now, see `read_table`."""
    base, classes, recipes = TrainingArguments, dict[str, Any](), {}
    classes[base.__name__] = {"options": _options(base)}
    for name in RECIPES:
        module = import_module(f"hf_objectives.recipes.{name}")
        given = module.CLASSES if hasattr(module, "CLASSES") else module.main.__self__.arguments
        groups = sorted(((_title(cls), cls) for cls in given), key=lambda group: TITLES.index(group[0]))
        recipes[name] = {"doc": _line(module), "classes": {cls.__name__: title for title, cls in groups}}
        for cls in given:
            entry: dict[str, Any] = {"options": _options(cls)}
            if issubclass(cls, base):
                known = classes[base.__name__]["options"]
                assert known.keys() <= entry["options"].keys()
                own = {key: option for key, option in entry["options"].items() if known.get(key) != option}
                entry = {"base": base.__name__, "options": own}
            classes[cls.__name__] = entry
    return {"versions": installed_versions(), "recipes": recipes, "classes": classes}


def _title(cls: type) -> str:
    return TITLES[2 if issubclass(cls, TrainingArguments) else 1 if issubclass(cls, ModelConfig) else 0]


def _line(documented: Any) -> str:
    return (documented.__doc__ or "").strip().splitlines()[0]


def _options(cls: type) -> dict[str, dict[str, Any]]:
    parser = HfArgumentParser(cls)  # type: ignore[arg-type]
    # Of a flag the parser also has the option that switches it off.
    found = {action.dest: action for action in reversed(parser._actions) if action.dest != "help"}
    return {name: _option(action) for name, action in reversed(found.items())}


def _option(action: Action) -> dict[str, Any]:
    default = action.default if isinstance(action.default, (bool, int, float, type(None))) else str(action.default)
    text = " ".join((action.help or "").replace("%%", "%").split())
    choices = {} if action.choices is None else {"choices": [str(choice) for choice in action.choices]}
    return {"help": text, "default": default, **choices}


if __name__ == "__main__":
    TABLE.write_text(json.dumps(live_table(), indent=0, ensure_ascii=False) + "\n", encoding="utf-8")
