"""An `OrderedStream` as a `datasets.IterableDataset`, for hosts that take nothing else (TRL's SFTTrainer).

This is the only file that touches the private base class of examples in `datasets`. Its test holds it against the installed
release.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset, DatasetInfo, IterableDataset
from datasets.iterable_dataset import _BaseExamplesIterable

from hf_objectives.distributed import is_shared_out
from hf_objectives.errors import ConfigError
from hf_objectives.types import called_by

if TYPE_CHECKING:
    from hf_objectives.preparation.ordered_stream import OrderedStream

_STATE_EVERY = 256  # rows from one state of the stream to the next


def to_iterable_dataset(stream: OrderedStream) -> IterableDataset:
    """See `OrderedStream.to_iterable_dataset`."""
    first = next(iter(stream.rows(0, 1)), None)
    if first is None:
        raise ConfigError("the stream holds no row")
    features = Dataset.from_list([_plain(first)]).features
    return IterableDataset(ex_iterable=_Examples(stream), info=DatasetInfo(features=features))


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in row.items()}


class _Examples(_BaseExamplesIterable):
    """The rows of a stream; the state is that of the stream a little before, and the rows since."""

    def __init__(self, stream: OrderedStream) -> None:
        super().__init__()
        self.stream = stream
        self._is_shared_out = False
        self._state_dict: Any

    def _init_state_dict(self) -> dict[str, Any]:
        self._state_dict = {"stream": None, "since": 0, "type": type(self).__name__}
        return self._state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        self._init_state_dict().update(state_dict)
        return self._state_dict

    def __getstate__(self) -> dict[str, Any]:
        # A spawned loader worker cannot see who asks for its rows.
        return {**vars(self), "_is_shared_out": self._is_shared_out or is_shared_out()}

    def __iter__(self) -> Iterator[tuple[Any, dict[str, Any]]]:
        if called_by("datasets.iterable_dataset", "StepExamplesIterable.__iter__") and (
            self._is_shared_out or is_shared_out()
        ):
            raise ConfigError(
                "split_dataset_by_node gives each process every n-th row of the stream, and accelerate, which Trainers use, "
                "divides these among the processes again, so that most would never be read; leave split_dataset_by_node out"
            )
        state: dict[str, Any] = self._state_dict or self._init_state_dict()
        if state["stream"] is None:
            state["stream"] = self.stream.state_dict(self.stream._begin)
        self.stream.load_state_dict(state["stream"])
        begin = state["stream"]["row"] + state["since"]
        # Not `iter(self.stream)`, which gives a loader's worker its turns: datasets lets one worker read, which reads all.
        turns = (range(row, row + _STATE_EVERY) for row in itertools.count(begin, _STATE_EVERY))
        for number, row in enumerate(self.stream.read_turns(turns), begin + 1):
            state["since"] += 1
            if state["since"] == _STATE_EVERY:
                state["stream"], state["since"] = self.stream.state_dict(number), 0
            yield number - 1, _plain(row)

    @property
    def num_shards(self) -> int:
        return 1

    def shuffle_data_sources(self, generator: np.random.Generator) -> _Examples:
        raise ConfigError("the rows of a stream have an order already; give build_mixture another seed")

    def shard_data_sources(self, num_shards: int, index: int, contiguous: bool = True) -> _Examples:
        if index:
            raise ConfigError(f"a stream is one shard; asked for shard {index} of {num_shards}")
        return self

    def reshard_data_sources(self) -> _Examples:
        return self
