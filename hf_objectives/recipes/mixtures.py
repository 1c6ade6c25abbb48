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

SOURCE_KEYS = ("weight", "max_epochs")  # keys of a source that the mixture reads; others are the preparation's
HELP = "Weights: a mixture's settings (JSON, or a YAML file) for the sources, or with sources of its own."


def read_mixture(mixture: str | None, sources: Mapping[str, Any]) -> dict[str, Any] | None:
    """The settings of a mixture, with the weights beside the sources; None where nothing asks for one.

    Args:
        mixture: the recipe's option: JSON text of a mapping, or the path of a YAML file.
        sources: the recipe's sources by name, each a path or a mapping.

    Raises:
        ConfigError: not a mapping, or a source that the recipe does not have.
    """
    beside = {name: source_settings(source) for name, source in sources.items()}
    if not mixture and not any(beside.values()):
        return None
    settings = _read(mixture) if mixture else {}
    if not sources:
        return settings
    own = settings.get("sources") or {}
    if not isinstance(own, dict) or not all(source is None or isinstance(source, dict) for source in own.values()):
        raise ConfigError(f"mixture: sources is {own!r}; expected names with weight and max_epochs")
    for name in own:
        if name not in sources:
            raise ConfigError(f"mixture names source {name!r}; expected one of {', '.join(sources)}")
    return {**settings, "sources": {name: {**beside[name], **(own.get(name) or {})} for name in sources}}


def source_settings(source: Any) -> dict[str, Any]:
    """Of a source, what the mixture reads: its weight and its epochs, where it has them."""
    return {key: source[key] for key in SOURCE_KEYS if key in source} if isinstance(source, Mapping) else {}


def _read(mixture: str) -> dict[str, Any]:
    is_json = mixture.lstrip().startswith("{")
    if not is_json and not Path(mixture).is_file():
        raise ConfigError(f"mixture names a file that does not exist: {mixture}")
    try:
        settings = json.loads(mixture) if is_json else yaml.safe_load(Path(mixture).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"mixture cannot be read: {error}") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"mixture is {type(settings).__name__}; expected a mapping, see MixtureConfig")
    return settings


def mix_folder(settings: Mapping[str, Any], folder: Path, tokenizer: Any, seed: int) -> DatasetMixture:
    """Mix the sources of a prepared folder."""
    sources = {name: {"path": str(folder), **source} for name, source in settings["sources"].items()}
    return build_mixture({**settings, "sources": sources}, tokenizer=tokenizer, seed=seed)


def mix_rows(
    settings: Mapping[str, Any], rows: Dataset, *, max_length: int, packing: bool, seed: int
) -> DatasetMixture:
    """Mix encoded rows by their `source` column; pack across sources unless the settings say otherwise.

    Raises:
        ConfigError: a source of which no row is left.
    """
    names = np.array(rows["source"][:])
    sources = {}
    for name, source in settings["sources"].items():
        numbers = np.flatnonzero(names == name)
        if not len(numbers):
            raise ConfigError(f"source {name!r} has no row to train on; take it out")
        sources[name] = {"dataset": rows.select(numbers).remove_columns("source"), **source}
    packed = {"packing": "across", "max_length": max_length} if packing else {}
    return build_mixture(MixtureConfig.read({**packed, **settings, "sources": sources}), seed=seed)
