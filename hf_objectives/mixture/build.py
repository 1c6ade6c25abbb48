"""A mixture from its configuration: sources opened, encoded where they are not yet, and compared with each other."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets

from hf_objectives.errors import ConfigError
from hf_objectives.mixture.config import MixtureConfig
from hf_objectives.mixture.dataset import DatasetMixture
from hf_objectives.mixture.feeds import Feed
from hf_objectives.mixture.order import Packer
from hf_objectives.mixture.sources import Opened, open_source
from hf_objectives.mixture.weights import WeightPlan

logger = logging.getLogger(__name__)
# Columns that some sources may have and others not: a mixture gives them, or a collator does without.
_OURS = frozenset(("source", "row", "sources", "rows", "labels"))


def build_mixture(
    config: MixtureConfig | Mapping[str, Any] | str | Path, *, tokenizer: Any = None, seed: int = 0
) -> DatasetMixture:
    """Several sources as one dataset, each with its share at every moment.

    Args:
        config: a `MixtureConfig`, a mapping with the same keys, or a YAML file of one.
        tokenizer: encodes sources whose rows have no `input_ids`, in memory (large ones are better prepared first, see
            `prepare_corpus`); None to leave rows as they are.
        seed: of the order, and of what is held out.

    Returns:
        An iterable of rows with a `source` column; see `DatasetMixture`.

    Raises:
        ConfigError: a setting that cannot work, or sources that do not go together; names the source.
        DataError: an empty source, or a row that cannot be used; names source and row.
        PreparedDataError: a prepared folder made with another tokenizer or length, or without the source.

    Example:
        >>> from datasets import Dataset
        >>> web, code = (Dataset.from_dict({"text": [name] * 5}) for name in ("web", "code"))
        >>> mixture = build_mixture({"sources": {"web": {"dataset": web, "weight": 0.75},
        ...                                      "code": {"dataset": code, "weight": 0.25}}, "unit": "examples"})
        >>> [row["source"] for row in mixture.rows(0, 8)]
        ['web', 'code', 'web', 'web', 'web', 'code', 'web', 'web']
    """
    config = MixtureConfig.read(config)
    opened = [open_source(source, config, tokenizer, seed) for source in config.sources]
    if config.packing != "across":
        _compare(opened)
    feeds = [one.feed for one in opened]
    natural = config.preset is None and all(source.weight is None for source in config.sources)
    plan, notes = config.plan([feed.pass_size() if natural else None for feed in feeds])
    notes = [note for one in opened for note in one.notes] + notes
    for note in notes:
        logger.warning(note)
    labelled = ["labels" in one.columns for one in opened]
    packer = None
    if config.packing == "across":
        packer = Packer(config.max_length or 0, config.strategy, config.overflow)
    return DatasetMixture(
        feeds,
        plan,
        unit=config.unit,
        about=_about(config, feeds, plan, seed),
        packer=packer,
        labels=any(labelled) and not all(labelled),
        eval_dataset=_held_out([(one.feed.name, one.held_out) for one in opened if one.held_out is not None]),
        notes=notes,
    )


def _compare(opened: Sequence[Opened]) -> None:
    """Sources of which one collator can make batches.

    Raises:
        ConfigError: they differ in a column; names the sources.
    """
    one = opened[0]
    for other in opened[1:]:
        names = [set(source.columns) - _OURS for source in (one, other)]
        if names[0] != names[1]:
            raise ConfigError(
                f"source {other.feed.name!r} has columns {', '.join(sorted(other.columns))}, source {one.feed.name!r} has "
                f"{', '.join(sorted(one.columns))}; expected the same: rename or remove columns, or give a tokenizer"
            )
        for name in sorted(names[0]):
            mine, theirs = one.columns[name], other.columns[name]
            if mine != theirs and mine and theirs:
                raise ConfigError(
                    f"column {name!r} of source {other.feed.name!r} is {theirs}, of source {one.feed.name!r} {mine}; "
                    "expected the same: cast one of them"
                )


def _held_out(parts: Sequence[tuple[str, Dataset]]) -> Dataset | None:
    """The evaluation rows of all sources, with a `source` column."""
    if not parts:
        return None
    named = []
    labelled = any("labels" in part.column_names for _, part in parts)
    for name, part in parts:
        if labelled and "labels" not in part.column_names:
            part = part.add_column("labels", part["input_ids"][:])
        if "source" in part.column_names:
            part = part.remove_columns("source")
        named.append(part.add_column("source", [name] * len(part)))
    first = named[0]
    for (name, _), part in zip(parts, named, strict=True):
        if set(part.column_names) != set(first.column_names):
            raise ConfigError(
                f"the evaluation rows of source {name!r} have columns {', '.join(part.column_names)}, those of source "
                f"{parts[0][0]!r} {', '.join(first.column_names)}; expected the same"
            )
    return concatenate_datasets([part.cast(first.features) for part in named])


def _about(config: MixtureConfig, feeds: Sequence[Feed], plan: WeightPlan, seed: int) -> dict[str, Any]:
    """What a state must agree with. Not the blocklist: to take out a row and go on is what it is for."""
    names = config.names
    return {
        "names": names,  # states go by their order
        "sources": {feed.name: feed.about() for feed in feeds},
        "weight": dict(zip(names, plan.weights.tolist(), strict=True)),
        "max_epochs": {source.name: source.max_epochs for source in config.sources},
        "stages": [[stage.begin, stage.end, stage.weights.tolist()] for stage in plan.stages],
        "unit": config.unit,
        "packing": [config.packing, config.max_length, config.strategy, config.overflow] if config.packing else None,
        "seed": seed,
    }
