"""Sources as orders of units: epochs, and looking ahead."""

from __future__ import annotations

from collections import Counter

import pytest

from hf_objectives.mixture.build import build_mixture
from hf_objectives.mixture.feeds import MappedFeed
from tests.support.mixtures import LENGTHS, mixture, source, taken


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_source_of_few_rows_is_looked_ahead_for_many_epochs(size, monkeypatch):
    asked = []
    whole = MappedFeed.ahead
    monkeypatch.setattr(MappedFeed, "ahead", lambda self, *given: asked.append(1) or whole(self, *given))
    few = {"a": source("a"), "z": source("c").select(range(size))}
    weighed = {name: {"dataset": rows, "weight": 1} for name, rows in few.items()}
    made = build_mixture({"sources": weighed, "unit": "examples"})
    rows = taken(made, 130)
    assert len(asked) < 20 and Counter(name for name, _ in rows) == {"a": 65, "z": 65}
    numbers = [number for name, number in rows if name == "z"]
    assert all(sorted(numbers[i : i + size]) == list(range(size)) for i in range(0, 64 - size, size))


@pytest.mark.parametrize("streams", [False, True])
def test_every_epoch_of_a_source_is_a_new_order_of_all_its_rows(streams):
    rows = taken(mixture({"unit": "examples"}, streams=streams), 1_500)
    for name, (size, *_) in LENGTHS.items():
        mine = [number for source, number in rows if source == name]
        epochs = [mine[i : i + size] for i in range(0, len(mine) - size + 1, size)]
        assert len(epochs) > 5 and all(sorted(one) == list(range(size)) for one in epochs)
        assert len({tuple(one) for one in epochs}) == len(epochs)
