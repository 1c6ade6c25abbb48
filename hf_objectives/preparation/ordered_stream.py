"""A stream without an end whose order depends on a seed alone: any number of ranks and loader workers read the same."""

from __future__ import annotations

import itertools
import sys
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from hf_objectives.errors import ConfigError

_AHEAD = 256  # rows that are looked up at a time


class OrderedStream(IterableDataset):
    """Rows 0, 1, 2, ... of an order that never ends, so that all ranks take the same number of steps.

    Each process iterates over the whole order. The DataLoader that accelerate prepares (`dispatch_batches=False`) keeps
    the batches of its rank: of the `batch_rows` rows that all ranks take together, rank r keeps the r-th part. Loader
    workers take turns of `batch_rows` rows, so the rows of a step do not depend on the number of workers either.

    Attributes:
        batch_rows: rows that all ranks take together in one micro-step; `PerplexityTrainer` sets it.
    """

    batch_rows: int = 1
    _begin: int = 0
    _placed: bool = False  # whether a state said where to begin

    @abstractmethod
    def rows(self, begin: int, end: int) -> Iterator[Mapping[str, Any]]:
        """Yield rows `begin` to `end` of the order."""

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        worker = get_worker_info()
        workers, own = (worker.num_workers, worker.id) if worker else (1, 0)
        # A single reader may take several turns at a time.
        size = self.batch_rows * (max(1, _AHEAD // self.batch_rows) if workers == 1 else 1)
        begins = (self._begin + turn * size for turn in itertools.count(own, workers))
        return self.read_turns(range(begin, begin + size) for begin in begins)

    def read_turns(self, turns: Iterable[range]) -> Iterator[Mapping[str, Any]]:
        """Yield the rows of ascending ranges of the order."""
        for turn in turns:
            yield from self.rows(turn.start, turn.stop)

    def set_epoch(self, epoch: int) -> None:
        """Called by the loaders of accelerate before an iteration begins, those of a Trainer among them.

        A Trainer that nobody told about the stream would read it from its beginning again when it resumes.

        Raises:
            ConfigError: a Trainer reads the stream, and nobody keeps its place.
        """
        if not self._placed and _called_by_a_trainer():
            raise ConfigError(
                "this Trainer does not keep the place of its stream, so that a resumed run would read the first rows again: "
                "add OrderedStreamCallback(stream) to its callbacks, or use PerplexityTrainer"
            )

    def expect(self, rows: int) -> list[str]:
        """What a user should know before a run takes this many rows from row 0 on.

        Raises:
            ConfigError: the stream ends before.
        """
        return []

    def metrics(self, rows_taken: int) -> dict[str, float]:
        """What a training log says about the rows up to this one."""
        return {}

    def state_dict(self, rows_taken: int | None = None) -> dict[str, Any]:
        """The state to resume from.

        Args:
            rows_taken: rows that all ranks have taken, from row 0. A loader reads ahead, so only the trainer knows this.
                None for the row at which iteration begins.
        """
        return {"row": self._begin if rows_taken is None else rows_taken}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Begin the next iteration at the row of a state; nothing is read again.

        Raises:
            ConfigError: the state is not one of a stream.
        """
        row = state.get("row")
        if not isinstance(row, int) or row < 0:
            raise ConfigError(f"the state of a stream has row {row!r}; expected a number of rows")
        self._begin, self._placed = row, True


def _called_by_a_trainer() -> bool:
    """Whether the loop that is about to read is that of a Trainer of transformers; in its own process, not in a worker."""
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_globals.get("__name__") == "transformers.trainer":
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False
