"""A mixture in a recipe: weights beside the sources, or a configuration of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from datasets import Dataset

from hf_objectives.errors import ConfigError
from hf_objectives.mixture import DatasetMixture, MixtureConfig, build_mixture

_OF_A_SOURCE = ("weight", "max_epochs")
HELP = "Weights: a mixture's settings (JSON, or a YAML file) for the sources, or with sources of its own."


def read_mixture(given: str | None, sources: Mapping[str, Any]) -> dict[str, Any] | None:
    """Settings of a mixture, those beside the sources included; None where nothing says that there is one.

    Args:
        given: `mixture` of the recipe: JSON text of a mapping, or the path of a YAML file.
        sources: the recipe's sources by name, each a path or a mapping.

    Raises:
        ConfigError: no mapping, or a source that the recipe does not have.
    """
    beside = {
        name: {key: where[key] for key in _OF_A_SOURCE if key in where}
        for name, where in sources.items()
        if isinstance(where, Mapping)
    }
    if not given and not any(beside.values()):
        return None
    settings: Any = {}
    if given:
        text = given if given.lstrip().startswith("{") else _file(given)
        try:
            settings = json.loads(text) if text is given else yaml.safe_load(text)
        except (json.JSONDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"mixture cannot be read: {error}") from error
        if not isinstance(settings, dict):
            raise ConfigError(f"mixture is {type(settings).__name__}; expected a mapping, see MixtureConfig")
    own = settings.get("sources") or {}
    if sources and not (
        isinstance(own, dict) and all(about is None or isinstance(about, dict) for about in own.values())
    ):
        raise ConfigError(f"mixture: sources is {own!r}; expected names with weight and max_epochs")
    if sources:
        for name in own:
            if name not in sources:
                raise ConfigError(f"mixture names source {name!r}; expected one of {', '.join(sources)}")
        settings["sources"] = {name: {**beside.get(name, {}), **dict(own.get(name) or {})} for name in sources}
    return settings


def _file(path: str) -> str:
    if not Path(path).is_file():
        raise ConfigError(f"mixture names a file that does not exist: {path}")
    return Path(path).read_text(encoding="utf-8")


def of_folder(settings: Mapping[str, Any], folder: Path, tokenizer: Any, seed: int) -> DatasetMixture:
    """The sources of a prepared folder, mixed."""
    sources = {name: {"path": str(folder), **about} for name, about in settings["sources"].items()}
    return build_mixture({**settings, "sources": sources}, tokenizer=tokenizer, seed=seed)


def of_rows(settings: Mapping[str, Any], rows: Dataset, *, max_length: int, packing: bool, seed: int) -> DatasetMixture:
    """Encoded rows with a `source` column, mixed, and packed across sources unless the settings say otherwise.

    Raises:
        ConfigError: a source of which no row is left.
    """
    of = np.array(rows["source"][:])
    sources = {}
    for name, about in settings["sources"].items():
        mine = np.flatnonzero(of == name)
        if not len(mine):
            raise ConfigError(f"source {name!r} has no row to train on; take it out")
        sources[name] = {"dataset": rows.select(mine).remove_columns("source"), **about}
    packed = {"packing": "across", "max_length": max_length} if packing else {}
    return build_mixture(MixtureConfig.read({**packed, **settings, "sources": sources}), seed=seed)
