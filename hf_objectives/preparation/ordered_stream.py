"""A stream without an end whose order is a pure function of a seed: any number of ranks and loader workers read the same."""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from hf_objectives.errors import ConfigError

_AHEAD = 256  # rows whose places are looked up at a time


class OrderedStream(IterableDataset):
    """Rows 0, 1, 2, ... of an order that never ends, so that every rank takes as many steps as the others.

    Each process iterates all of it, and the DataLoader that accelerate prepares (`dispatch_batches=False`) keeps each
    rank's batches: of `batch_rows` rows that all ranks take together, rank r keeps the r-th part. Loader workers take
    turns by so many rows, so that the rows of a step do not depend on their number either.

    Attributes:
        batch_rows: rows that all ranks take together in one micro-step; `PerplexityTrainer` sets it.
    """

    batch_rows: int = 1
    _begin: int = 0

    @abstractmethod
    def rows(self, begin: int, end: int) -> Iterator[Mapping[str, Any]]:
        """Rows `begin` to `end` of the order."""

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        worker = get_worker_info()
        workers, mine = (worker.num_workers, worker.id) if worker else (1, 0)
        # One reader alone may take several turns at a time.
        size = self.batch_rows * (max(1, _AHEAD // self.batch_rows) if workers == 1 else 1)
        begins = (self._begin + turn * size for turn in itertools.count(mine, workers))
        return self.read_turns(range(begin, begin + size) for begin in begins)

    def read_turns(self, turns: Iterable[range]) -> Iterator[Mapping[str, Any]]:
        """The rows of ascending ranges of the order."""
        for turn in turns:
            yield from self.rows(turn.start, turn.stop)

    def expect(self, rows: int) -> list[str]:
        """What there is to say before a run takes so many rows, from row 0.

        Raises:
            ConfigError: the stream ends before.
        """
        return []

    def metrics(self, rows_taken: int) -> dict[str, float]:
        """What a training log says of the rows up to here."""
        return {}

    def state_dict(self, rows_taken: int | None = None) -> dict[str, Any]:
        """Where to go on.

        Args:
            rows_taken: rows that all ranks have taken, from row 0; a loader reads ahead, so that only who trains knows.
                None for where iteration begins.
        """
        return {"row": self._begin if rows_taken is None else rows_taken}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The next iteration begins at the row that the state names; nothing is read again.

        Raises:
            ConfigError: no state of a stream.
        """
        row = state.get("row")
        if not isinstance(row, int) or row < 0:
            raise ConfigError(f"the state of a stream has row {row!r}; expected a number of rows")
        self._begin = row
