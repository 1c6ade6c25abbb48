"""A stream as a `datasets.IterableDataset`: its rows, its state, and the contact with private parts of datasets."""

from __future__ import annotations

import inspect
import itertools
import json

import datasets
import pytest
from datasets.iterable_dataset import _BaseExamplesIterable
from torch.utils.data import DataLoader

from hf_objectives.errors import ConfigError
from hf_objectives.preparation.iterable_dataset import _Examples
from hf_objectives.preparation.ordered_stream import OrderedStream


class Numbers(OrderedStream):
    def rows(self, begin, end):
        self.first_read = min(getattr(self, "first_read", begin), begin)
        return ({"n": n, "text": "x" * (n % 3)} for n in range(begin, end))


def test_contact_with_datasets():
    """If this fails, datasets moved: mend hf_objectives/preparation/iterable_dataset.py, the only place that uses it."""
    names = {name for name, _ in inspect.getmembers(_BaseExamplesIterable, inspect.isfunction)}
    assert {"_init_state_dict", "load_state_dict", "shuffle_data_sources", "shard_data_sources"} <= names
    assert "ex_iterable" in inspect.signature(datasets.IterableDataset.__init__).parameters
    overridden = {name for name in vars(_Examples) if not name.startswith("__")}
    assert overridden <= names | {"num_shards", "_abc_impl"}


@pytest.mark.parametrize("taken", [0, 1, 255, 256, 257, 1_000])
def test_it_resumes_at_the_row_without_reading_what_came_before(taken):
    made = Numbers().to_iterable_dataset()
    assert isinstance(made, datasets.IterableDataset) and made.column_names == ["n", "text"]
    rows = iter(made)
    assert [next(rows)["n"] for _ in range(taken)] == list(range(taken))
    state = json.loads(json.dumps(made.state_dict()))
    stream = Numbers()
    resumed = stream.to_iterable_dataset()
    stream.first_read = taken
    resumed.load_state_dict(state)
    assert [row["n"] for row in itertools.islice(resumed, 300)] == list(range(taken, taken + 300))
    assert stream.first_read > taken - 256


def test_it_goes_through_the_tools_of_datasets_but_is_not_shuffled():
    made = Numbers().to_iterable_dataset()
    mapped = made.map(lambda row: {"double": 2 * row["n"]}).filter(lambda row: row["n"] % 2).take(3)
    assert [row["double"] for row in mapped] == [2, 6, 10]
    with pytest.raises(ConfigError, match="have an order already; give build_mixture another seed"):
        next(iter(made.shuffle(seed=1)))


@pytest.mark.parametrize("workers", [1, 2])
def test_of_several_loader_workers_one_reads_all_rows(workers):
    """datasets stops the others; what the stream would give a worker are its turns alone."""
    stream = Numbers()
    stream.batch_rows = 4
    loader = DataLoader(stream.to_iterable_dataset(), batch_size=4, num_workers=workers)
    assert [n for batch in itertools.islice(loader, 5) for n in batch["n"].tolist()] == list(range(20))


def test_a_second_shard_is_refused():
    made = Numbers().to_iterable_dataset()
    with pytest.raises(ConfigError, match="a stream is one shard; asked for shard 1 of 2"):
        next(iter(made.shard(2, 1)))


def test_a_stream_without_rows_is_an_error():
    class Empty(OrderedStream):
        def rows(self, begin, end):
            return iter(())

    with pytest.raises(ConfigError, match="holds no row"):
        Empty().to_iterable_dataset()
