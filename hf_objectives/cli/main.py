"""`hf-objectives`: the command line.

hf-objectives inspect --dataset_name chats.jsonl --tokenizer folder [--html labels.html]
hf-objectives prepare --config corpus.yaml [--option value ...]
hf-objectives mixture --mixture mixture.yaml [--tokens 1000000000] [--plot mixture.png]
hf-objectives mixture --run runs/base [--plot mixture.png]
hf-objectives diagnose runs/base [more runs ...] [--json] [--fail_on warning]
hf-objectives plot runs/base [more runs ...] [--output training_curves.png]
hf-objectives report runs/base [--output report.html] [--compare runs/other]
hf-objectives replay runs/base/diagnostics/step_120_rank_0 [--model folder]
hf-objectives rows runs/base --step 120 [--text] [--json]

A recipe runs in one process (accelerate launch recipes/sft.py runs it on several):
hf-objectives sft|distill|... --config recipe.yaml [--option value ...]
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from importlib import import_module

from hf_objectives.cli.options import COMMANDS, parse
from hf_objectives.errors import ConfigError, HFObjectivesError, nearest

#: Recipes, each a module of `hf_objectives.recipes` with a `main`.
RECIPES = ("pretrain", "sft", "distill", "reward", "dpo", "ppo", "stack", "mixture_search")


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command. An error of ours, or of the file system, is one line on stderr and exit code 2."""
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(f"usage: hf-objectives {{{','.join((*COMMANDS, *RECIPES))}}} ...\n\n{(__doc__ or '').strip()}")
        return
    try:
        code = run_command(words)
    except (HFObjectivesError, OSError) as error:  # a tokenizer that is not found, a folder that cannot be made
        print(f"{type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
        code = 2
    if code:
        sys.exit(code)


def run_command(words: Sequence[str]) -> int | None:
    """Run a command, which comes before its arguments, and let its errors through; returns the exit code, None for 0."""
    name, *argv = words
    if name in RECIPES:
        import_module(f"hf_objectives.recipes.{name}").main(argv)
        return None
    if name not in COMMANDS:
        known = (*COMMANDS, *RECIPES)
        raise ConfigError(f"unknown command {name!r}; expected one of {', '.join(known)}{nearest(name, known)}")
    options = parse(name, argv)
    return getattr(import_module(f"hf_objectives.cli.{COMMANDS[name][0]}"), name)(options)
