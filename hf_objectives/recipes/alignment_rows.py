"""What the recipes of alignment share: rows to train on and held out, and rows whose perplexity is watched."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_objectives import demo
from hf_objectives.errors import ConfigError
from hf_objectives.preparation import hold_out, load_rows
from hf_objectives.recipes.run import BUILT_IN

Rows = list[dict[str, Any]]


@dataclass
class RowArguments:
    """Where the rows come from."""

    dataset_name: str = field(default=BUILT_IN, metadata={"help": "Rows: a Hub id, a file, or 'builtin'."})
    dataset_split: str = field(default="train", metadata={"help": "Split of a Hub dataset."})
    eval_share: float = field(default=0.1, metadata={"help": "Share of the rows that is held out."})


def split_rows(data: RowArguments, *, seed: int, built_in: tuple[int, int]) -> tuple[Rows, Rows]:
    """Rows to train on and rows held out, each with its `source` and its number there in `row`.

    Args:
        data: where they come from.
        seed: decides which are held out.
        built_in: how many built-in preference rows to train on, and how many to hold out.

    Raises:
        FileFormatError: a file that cannot be read.
        ConfigError: an `eval_share` that leaves nothing to train on.
    """
    if data.dataset_name == BUILT_IN:
        train, held_out = built_in
        parts = [demo.preferences(train, seed=seed), demo.preferences(held_out, seed=seed, split="test")]
        train_rows, held = ([{**row, "source": BUILT_IN, "row": i} for i, row in enumerate(part)] for part in parts)
        return train_rows, held
    found = load_rows(data.dataset_name, split=data.dataset_split)
    name = Path(data.dataset_name).name
    keep, out = (
        [{**found[i], "source": name, "row": i} for i in part] for part in hold_out(found, data.eval_share, seed=seed)
    )
    return keep, out


def lm_datasets(given: str | None) -> dict[str, Any] | None:
    """Rows by name whose perplexity is watched.

    Raises:
        ConfigError: not a mapping.
    """
    if not given:
        return None
    try:
        named = json.loads(given)
    except json.JSONDecodeError as error:
        raise ConfigError(f"lm_datasets is not a mapping of names to files ({error})") from error
    if not isinstance(named, dict):
        raise ConfigError("lm_datasets is not a mapping of names to files")
    built_in = {"texts": demo.texts, "chats": demo.chats}
    rows = {}
    for name, where in named.items():
        if where == BUILT_IN and name not in built_in:
            raise ConfigError(f"lm_datasets: {name!r} is 'builtin'; the built-in corpus has {' and '.join(built_in)}")
        rows[name] = built_in[name](200, split="test") if where == BUILT_IN else load_rows(where)
    return rows
