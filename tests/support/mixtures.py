"""Small sources for the tests of mixtures: rows whose ids tell where they are from."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset, disable_progress_bars
from numpy.typing import NDArray

from hf_objectives.mixture.build import build_mixture
from hf_objectives.mixture.dataset import DatasetMixture
from hf_objectives.mixture.weights import WeightPlan

disable_progress_bars()
LENGTHS = {"a": (40, 5, 60), "b": (25, 50, 90), "c": (7, 1, 9)}  # rows, shortest, longest


def source(name: str) -> Dataset:
    """Encoded rows; `n` is the row's number, and each of its ids says source and number."""
    rows, least, most = LENGTHS[name]
    sizes = np.random.default_rng(ord(name)).integers(least, most + 1, rows)
    ids = [[1_000 * ord(name) + number] * int(size) for number, size in enumerate(sizes)]
    return Dataset.from_dict({"input_ids": ids, "n": list(range(rows))})


def sources(weights: Sequence[float] = (0.6, 0.3, 0.1), *, streams: bool = False, **more: Any) -> dict[str, Any]:
    """The three sources as a configuration takes them."""
    made = {}
    for name, weight in zip("abc", weights, strict=True):
        rows = source(name)
        made[name] = {
            "dataset": rows.to_iterable_dataset(num_shards=3) if streams else rows,
            "weight": weight,
            **{key: value[name] for key, value in more.items() if name in value},
        }
    return made


def mixture(
    config: Mapping[str, Any] | None = None, *, seed: int = 0, streams: bool = False, **more: Any
) -> DatasetMixture:
    """A mixture of the three."""
    return build_mixture({"sources": sources(streams=streams, **more), "buffer_size": 8, **(config or {})}, seed=seed)


def taken(mixture: DatasetMixture, rows: int) -> list[tuple]:
    """The first rows, as what tells them apart."""
    return [name_of(row) for row in itertools.islice(mixture, rows)]


def name_of(row: Mapping[str, Any]) -> tuple:
    """A row as source and number; packed ones as all of theirs."""
    if "sources" in row:
        return tuple(zip(row["sources"], row["rows"], row["seq_lengths"], strict=True))
    return row["source"], row["n"]


KINDS: dict[str, dict[str, Any]] = {
    "tokens": {},
    "examples": {"unit": "examples"},
    "within": {"packing": "within", "max_length": 64},
    "across": {"packing": "across", "max_length": 64},
    "concat": {"packing": "across", "max_length": 64, "strategy": "concat"},
    "streams": {},
    "streams within": {"packing": "within", "max_length": 64},
    "streams across": {"packing": "across", "max_length": 64},
}


def of_kind(kind: str, seed: int = 0, **more: Any) -> DatasetMixture:
    """A mixture of the three, of one of KINDS."""
    return mixture({**KINDS[kind], **more}, streams=kind.startswith("streams"), seed=seed)


def due_on_the_line(plan: WeightPlan, units: float) -> NDArray[np.float64]:
    """What each source should have had after so many units, where weights move in straight lines; the reference."""
    due, place, weights = np.zeros(len(plan.weights)), 0.0, plan.weights
    for stage in plan.stages:
        due += weights * (min(stage.begin, units) - place)
        if units <= stage.begin:
            return due
        length, end = stage.end - stage.begin, min(stage.end, units)
        if length:  # the middle of the part of the line that is walked
            share = (end - stage.begin) / length / 2
            due += (weights + share * (stage.weights - weights)) * (end - stage.begin)
        if units <= stage.end:
            return due
        place, weights = stage.end, stage.weights
    return due + weights * (units - place)
