"""One order for all who read: any ranks and workers, forked or spawned."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from accelerate.state import PartialState
from torch.utils.data import DataLoader

from hf_objectives.mixture.build import build_mixture
from tests.support.mixtures import mixture, name_of, of_kind, source, sources, taken


def steps_of(made, ranks: int, workers: int, steps: int, size: int = 2) -> list[tuple]:
    """The rows of some steps, the parts of all ranks end to end, as their Trainers would get them."""
    PartialState(cpu=True)
    made.batch_rows = size * ranks
    parts = []
    for rank in range(ranks):
        loader = DataLoader(made, batch_size=size, num_workers=workers, collate_fn=list)
        prepared = prepare_data_loader(
            loader, torch.device("cpu"), ranks, rank, put_on_device=False, dispatch_batches=False, rng_types=[]
        )
        parts.append(list(itertools.islice(prepared, steps)))
    return [name_of(row) for step in zip(*parts, strict=True) for part in step for row in part]


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "workers"), [(1, 3), (2, 2), (4, 0)])
@pytest.mark.parametrize("some", ["tokens", "across", "streams"])
def test_any_ranks_and_workers_read_the_same_rows_once_and_go_on_under_others(some, ranks, workers):
    expected = taken(of_kind(some), 48)
    made = of_kind(some)
    assert steps_of(made, ranks, workers, 24 // (2 * ranks)) == expected[:24]
    state = json.loads(json.dumps(made.state_dict(24)))
    for other_ranks, other_workers in ((4 // ranks, (workers + 2) % 5), (2, 0)):
        resumed = of_kind(some)
        resumed.load_state_dict(state)
        assert steps_of(resumed, other_ranks, other_workers, 24 // (2 * other_ranks)) == expected[24:]


@pytest.mark.slow
def test_spawned_workers_read_it_as_forked_ones_do():
    def some():
        both = sources()
        both["b"]["dataset"] = both["b"]["dataset"].to_iterable_dataset()
        return build_mixture({"sources": both, "unit": "examples", "buffer_size": 8})

    made = some()
    made.batch_rows = 4
    loader = DataLoader(made, batch_size=4, num_workers=2, collate_fn=list, multiprocessing_context="spawn")
    rows = [name_of(row) for batch in itertools.islice(loader, 6) for row in batch]
    assert rows == taken(some(), 24)
    assert made.report(24)["a"].examples == sum(name == "a" for name, _ in rows)


def test_seeds_and_other_sources_change_orders():
    base = taken(mixture(), 300)
    assert taken(mixture(), 300) == base and taken(mixture(seed=1), 300) != base
    # A source's own order does not depend on its companions.
    alone = build_mixture({"sources": {"b": source("b")}}, seed=0)
    mine = [row for row in base if row[0] == "b"]
    assert taken(alone, len(mine)) == mine


def test_a_stream_without_a_weight_is_never_waited_for():
    def rows():
        yield {"input_ids": [1], "n": 0}
        raise AssertionError("waited for")

    late = type("Late", (), {"__iter__": lambda self: rows()})()
    made = mixture({"sources": {**sources(), "d": {"dataset": late, "weight": 0}}})
    assert taken(made, 300) == taken(mixture(), 300)
