"""A mixture from its configuration: sources opened, encoded where they are not yet, and compared with each other."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets

from hf_objectives.errors import ConfigError
from hf_objectives.mixture.across import Packer
from hf_objectives.mixture.config import MixtureConfig
from hf_objectives.mixture.dataset import DatasetMixture
from hf_objectives.mixture.order import labels_of
from hf_objectives.mixture.sources import Opened, open_source
from hf_objectives.mixture.stream_feed import Feed
from hf_objectives.mixture.weights import WeightPlan, plan_weights

logger = logging.getLogger(__name__)
# Columns that some sources may have and others not: a mixture adds them, or a collator does without.
_OPTIONAL = frozenset(("source", "row", "sources", "rows", "labels", "position_ids"))


def build_mixture(
    config: MixtureConfig | Mapping[str, Any] | str | Path, *, tokenizer: Any = None, seed: int = 0
) -> DatasetMixture:
    """Mix several sources into one dataset, each with its share at every moment.

    Args:
        config: a `MixtureConfig`, a mapping with the same keys, or a YAML file of one.
        tokenizer: encodes sources whose rows have no `input_ids`, in memory (large ones are better prepared first, see
            `prepare_corpus`); None to leave rows as they are.
        seed: seed of the order, and of what is held out.

    Returns:
        An iterable of rows with a `source` column; see `DatasetMixture`.

    Raises:
        ConfigError: a setting cannot work, or sources do not go together; names the source.
        DataError: a source is empty, or a row cannot be used; names source and row.
        PreparedDataError: a prepared folder has another tokenizer or length, or lacks the source.

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
        _compare_columns(opened)
    feeds = [source.feed for source in opened]
    natural = config.preset is None and all(source.weight is None for source in config.sources)
    plan, notes = plan_weights(config, [feed.epoch_size() if natural else None for feed in feeds])
    notes = [note for source in opened for note in source.notes] + notes
    for note in notes:
        logger.warning(note)
    labelled = ["labels" in source.columns for source in opened]
    return DatasetMixture(
        feeds,
        plan,
        unit=config.unit,
        fingerprint=_fingerprint(config, feeds, plan, seed),
        blocklist=config.blocklist,
        packer=Packer(**config.packed_by) if config.packing == "across" else None,
        labels=any(labelled) and not all(labelled),
        eval_dataset=_join_held_out({s.feed.name: s.held_out for s in opened if s.held_out is not None}),
        notes=notes,
    )


def _compare_columns(opened: Sequence[Opened]) -> None:
    """Check that one collator can make batches of all sources."""
    first = opened[0]
    expected = set(first.columns) - _OPTIONAL
    for other in opened[1:]:
        if set(other.columns) - _OPTIONAL != expected:
            raise ConfigError(
                f"source {other.feed.name!r} has columns {', '.join(sorted(other.columns))}, source {first.feed.name!r} "
                f"has {', '.join(sorted(first.columns))}; expected the same: rename or remove columns, or give a tokenizer"
            )
        for name in sorted(expected):
            found, wanted = other.columns[name], first.columns[name]
            if found != wanted and found and wanted:
                raise ConfigError(
                    f"column {name!r} of source {other.feed.name!r} is {found}, of source {first.feed.name!r} {wanted}; "
                    "expected the same: cast one of them"
                )


def _join_held_out(parts: Mapping[str, Dataset]) -> Dataset | None:
    """The evaluation rows of all sources, with a `source` column."""
    named: dict[str, Dataset] = {}
    labelled = any("labels" in part.column_names for part in parts.values())
    for name, part in parts.items():
        if labelled and "labels" not in part.column_names:
            part = part.map(lambda row: {"labels": labels_of(row)})
        if "source" in part.column_names:
            part = part.remove_columns("source")
        named[name] = part.add_column("source", [name] * len(part))
        first, expected = next((name, part.column_names) for name, part in named.items())
        if set(named[name].column_names) != set(expected):
            raise ConfigError(
                f"the evaluation rows of source {name!r} have columns {', '.join(named[name].column_names)}, those of "
                f"source {first!r} {', '.join(expected)}; expected the same"
            )
    return concatenate_datasets([part.cast(named[first].features) for part in named.values()]) if named else None


def _fingerprint(config: MixtureConfig, feeds: Sequence[Feed], plan: WeightPlan, seed: int) -> dict[str, Any]:
    """What a state must agree with. Not the blocklist: it is there to take out a row and go on."""
    names = config.names
    return {
        "names": names,  # states go by their order
        "sources": {feed.name: feed.fingerprint() for feed in feeds},
        "weight": dict(zip(names, plan.weights.tolist(), strict=True)),
        "max_epochs": {source.name: source.max_epochs for source in config.sources},
        "stages": [[stage.begin, stage.end, stage.weights.tolist()] for stage in plan.stages],
        "unit": config.unit,
        "packing": [config.packing, config.max_length, config.strategy, config.overflow] if config.packing else None,
        "seed": seed,
    }
