"""A stream without an end whose order depends on a seed alone: any number of ranks and loader workers read the same."""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch.utils.data import IterableDataset, get_worker_info

from hf_objectives.distributed import world_size
from hf_objectives.errors import ConfigError
from hf_objectives.types import called_by

if TYPE_CHECKING:
    import datasets

_AHEAD = 256  # rows that are looked up at a time


class OrderedStream(IterableDataset):
    """Rows 0, 1, 2, ... of an order that never ends, so that all ranks take the same number of steps.

    Each process iterates over the whole order. The DataLoader that accelerate prepares (`dispatch_batches=False`) keeps
    the batches of its rank: of the `batch_rows` rows that all ranks take together, rank r keeps the r-th part. Loader
    workers take turns of `batch_rows` rows, so the rows of a step do not depend on the number of workers either.

    `state_dict()` says where a plain loop stands, and where a `torchdata.StatefulDataLoader` does, in each of its workers.

    Attributes:
        batch_rows: rows that all ranks take together in one micro-step: the batch size times the ranks. Needed by several
            loader workers; `PerplexityTrainer` and `OrderedStreamCallback` set it.
    """

    batch_rows: int | None = None
    _begin: int = 0  # row at which iteration begins
    _skipped: int = 0  # rows that this worker took of its turns before
    _taken: int = 0  # rows that this worker has taken of its turns
    _reader: tuple[int, int] = (1, 0)  # number of workers and of this one
    _resumed_by: tuple[int, int] | None = None
    _placed: bool = False  # whether a state said where to begin

    @abstractmethod
    def rows(self, begin: int, end: int) -> Iterator[Mapping[str, Any]]:
        """Yield rows `begin` to `end` of the order."""

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        """Iterate over this worker's rows.

        Raises:
            ConfigError: several workers and no `batch_rows`, or a state of other workers.
        """
        worker = get_worker_info()
        self._reader = (worker.num_workers, worker.id) if worker else (1, 0)
        if self._resumed_by not in (None, self._reader):
            raise ConfigError(
                f"the state is of loader worker {self._resumed_by[1]} of {self._resumed_by[0]}, this is worker "
                f"{self._reader[1]} of {self._reader[0]}; resume with as many workers"
            )
        if self._reader[0] > 1 and self.batch_rows is None:
            raise ConfigError(
                "several loader workers take turns by batches; set the stream's batch_rows to the batch size (times the "
                "number of processes that take different rows)"
            )
        self._taken = self._skipped
        return self._counted()

    def _counted(self) -> Iterator[Mapping[str, Any]]:
        workers, own = self._reader
        rows = self.batch_rows or 1
        # A single reader may take several turns at a time.
        size = rows * (max(1, _AHEAD // rows) if workers == 1 else 1)
        first, within = divmod(self._taken, size)
        begins = (self._begin + (own + turn * workers) * size for turn in itertools.count(first))
        turns = (range(begin, begin + size) for begin in begins)
        part = next(turns)
        for row in self.read_turns(itertools.chain([part[within:]], turns)):
            self._taken += 1
            yield row

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
        if not self._placed and called_by("transformers.trainer"):
            raise ConfigError(
                "this Trainer does not keep the place of its stream, so that a resumed run would read the first rows again: "
                "add OrderedStreamCallback(stream) to its callbacks, or use PerplexityTrainer"
            )

    def to_iterable_dataset(self) -> datasets.IterableDataset:
        """This stream as a `datasets.IterableDataset`, for hosts that take nothing else, such as TRL's `SFTTrainer`.

        Its state resumes at the row itself, without reading what came before. Of several loader workers one reads it. The
        stream and the dataset have one place: read either.

        Raises:
            ConfigError: the stream holds no row; on `shuffle`, since the rows are in order; on `shard`, since it is one.
        """
        from hf_objectives.preparation.iterable_dataset import to_iterable_dataset

        return to_iterable_dataset(self)

    def expect(self, rows: int) -> list[str]:
        """What a user should know before a run takes this many rows; a ConfigError where the stream ends before."""
        return []

    def metrics(self, rows_taken: int) -> dict[str, float]:
        """What a training log says about the rows up to this one."""
        return {}

    def state_dict(self, rows_taken: int | None = None) -> dict[str, Any]:
        """The state to resume from.

        Args:
            rows_taken: rows that all ranks have taken, from row 0. A loader reads ahead, so only the trainer knows this.
                None for the rows that this process, or this loader worker, has read.

        Raises:
            ConfigError: None, where what was read is not what was taken: several processes, or
                `Accelerator.register_for_checkpointing`.
        """
        if rows_taken is not None:
            return {"row": rows_taken}
        if self._taken > self._skipped:
            _check_taken()
        workers, own = self._reader
        if workers == 1:
            return {"row": self._begin + self._taken}
        turn, within = divmod(self._taken, self.batch_rows or 1)
        row = self._begin + (own + turn * workers) * (self.batch_rows or 1) + within
        reader = {"begin": self._begin, "read": self._taken, "workers": workers, "worker": own}
        return {"row": row, "reader": {**reader, "batch_rows": self.batch_rows}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Begin the next iteration at the row of a state, a ConfigError where it has none; nothing is read again."""
        row, reader = state.get("row"), state.get("reader")
        if not isinstance(row, int) or row < 0:
            raise ConfigError(f"the state of a stream has row {row!r}; expected a number of rows")
        self._begin, self._skipped, self._resumed_by = row, 0, None
        if reader is not None:
            if self.batch_rows not in (None, reader["batch_rows"]):
                raise ConfigError(f"the state is of batch_rows={reader['batch_rows']}; found {self.batch_rows}")
            self.batch_rows = reader["batch_rows"]
            self._begin, self._skipped = reader["begin"], reader["read"]
            self._resumed_by = reader["workers"], reader["worker"]
        self._taken, self._placed = self._skipped, True


def _check_taken() -> None:
    """Refuse a state of what was read where that is more than what was taken."""
    if called_by("accelerate.checkpointing", "save_custom_state"):
        raise ConfigError(
            "register_for_checkpointing saves what a loader has read, which is ahead of what was trained on; use "
            "DataLoaderConfiguration(use_stateful_dataloader=True), or save stream.state_dict(rows_taken)"
        )
    if world_size() > 1:
        raise ConfigError(
            "each of several processes reads rows that others take; say how many all have taken: state_dict(rows_taken)"
        )
