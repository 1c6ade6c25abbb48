"""A stream in the order of its rows: who reads it, how many and from where changes nothing."""

from __future__ import annotations

import itertools

import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from accelerate.state import PartialState
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from hf_objectives.errors import ConfigError
from hf_objectives.preparation.ordered_stream import OrderedStream


class Numbers(OrderedStream):
    """Row n is n."""

    def rows(self, begin, end):
        yield from range(begin, end)


def of_rank(stream, rank, ranks, workers, batch_size=3):
    """Batches as a rank's Trainer gets them."""
    PartialState(cpu=True)
    stream.batch_rows = batch_size * ranks
    loader = DataLoader(stream, batch_size=batch_size, num_workers=workers, collate_fn=list)
    return prepare_data_loader(
        loader, torch.device("cpu"), ranks, rank, put_on_device=False, dispatch_batches=False, rng_types=[]
    )


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "workers"), [(1, 4), (2, 3), (3, 1), (4, 2), (5, 0)])
def test_ranks_and_workers_share_the_order_and_nothing_else(ranks, workers):
    stream = Numbers()
    stream.load_state_dict({"row": 7})
    steps = [list(itertools.islice(of_rank(stream, rank, ranks, workers), 5)) for rank in range(ranks)]
    # Step by step, the parts of the ranks end to end are the order from row 7 on.
    assert [n for step in zip(*steps, strict=True) for part in step for n in part] == list(range(7, 7 + 5 * 3 * ranks))


@pytest.mark.slow
@settings(deadline=None, max_examples=50)
@given(st.integers(0, 1000), st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(0, 6)), max_size=5))
def test_resumed_under_any_number_of_ranks_it_goes_on_with_the_next_row(begin, runs):
    stream, seen = Numbers(), []
    stream.load_state_dict({"row": begin})
    for ranks, batch_size, steps in runs:
        parts = [list(itertools.islice(of_rank(stream, r, ranks, 0, batch_size), steps)) for r in range(ranks)]
        seen += [n for step in zip(*parts, strict=True) for part in step for n in part]
        stream.load_state_dict(stream.state_dict(begin + len(seen)))
    assert seen == list(range(begin, begin + len(seen)))
    assert stream.state_dict() == {"row": begin + len(seen)}


@pytest.mark.parametrize("state", [{}, {"row": -1}, {"row": "7"}])
def test_another_state_is_named(state):
    with pytest.raises(ConfigError, match="expected a number of rows"):
        Numbers().load_state_dict(state)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_trainer_is_refused_until_somebody_keeps_the_place(ranks, workers):
    """And no other loop that reads through a loader of accelerate."""
    stream = Numbers()
    loader = of_rank(stream, 0, ranks, workers)
    assert next(iter(loader)) == [0, 1, 2]
    loop = {"__name__": "transformers.trainer"}
    exec("def read(loader): return next(iter(loader))", loop)
    with pytest.raises(ConfigError, match="add OrderedStreamCallback"):
        loop["read"](loader)
    stream.load_state_dict(stream.state_dict(0))
    assert loop["read"](loader) == [0, 1, 2]
