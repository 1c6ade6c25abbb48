"""How a `PerplexityTrainer` gets its batches: the collator it takes by itself, settings, and the rows of an evaluation."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch.utils.data import DataLoader, IterableDataset, Subset

from hf_objectives.collators import (
    DataCollatorForAssistantOnlyLM,
    DataCollatorForPreferencePairs,
    DataCollatorWithEosPacking,
)
from hf_objectives.distributed import rank, world_size
from hf_objectives.errors import ConfigError
from hf_objectives.evaluation import num_embeddings
from hf_objectives.preparation import OrderedStream

OUR_COLLATORS = (DataCollatorForAssistantOnlyLM, DataCollatorWithEosPacking)
_PACKED = ("seq_lengths", "position_ids")  # columns that say where the documents of a row lie


def collator_for(rows: Any, tokenizer: Any) -> Any:
    """The collator for rows that come without one: they are padded, or taken as they are where they are packed.

    Packed rows are a `datasets.Dataset` or a list whose rows have `input_ids` with `seq_lengths` or `position_ids`. Of a
    stream, and of other datasets, this cannot be told; the collator that pads refuses rows of several documents.
    """
    longest = _longest_packed(rows)
    if longest is None:
        return DataCollatorForAssistantOnlyLM(tokenizer, return_source=True)
    # Rows of one document among them are packed here: any fits, with an EOS of its own.
    return DataCollatorWithEosPacking(tokenizer, max_length=max(2, longest + 1), return_source=True)


def _longest_packed(rows: Any) -> int | None:
    """Tokens of the longest row where rows are packed, else None."""
    if isinstance(rows, Dataset):
        columns = rows.column_names
    elif isinstance(rows, (list, tuple)) and rows and isinstance(rows[0], Mapping):
        columns = list(rows[0])
    else:
        return None
    if "input_ids" not in columns or not any(name in columns for name in _PACKED):
        return None
    if not isinstance(rows, Dataset):
        return max(len(row["input_ids"]) for row in rows if row.get("input_ids") is not None)
    column = rows.data.column("input_ids")  # also of rows that were selected away: no row is longer
    if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
        return None
    return int(pc.max(pc.list_value_length(column)).as_py() or 0)


def bound_ids(collator: Any, model: Any) -> None:
    """Let one of our collators refuse ids that a model has no embedding for, which a GPU reports without a row."""
    if isinstance(collator, (*OUR_COLLATORS, DataCollatorForPreferencePairs)):
        collator.num_ids = num_embeddings(model)


def settle_batches(args: Any, train_dataset: Any) -> None:
    """Let each rank collate its own batches; those that one process hands out are cut or joined row by row.

    Raises:
        ConfigError: settings of `accelerator_config` that would change the batches of a collator.
    """
    settings = args.accelerator_config
    if settings.dispatch_batches:
        raise ConfigError(
            "dispatch_batches joins and cuts batches after they are collated, which packed rows and rows of several widths "
            "do not survive; leave it out of accelerator_config"
        )
    if isinstance(train_dataset, IterableDataset):
        settings.dispatch_batches = False  # every rank reads all rows; accelerate's default is that one process does
    if isinstance(train_dataset, OrderedStream):
        if settings.split_batches:
            raise ConfigError("split_batches divides each batch of a stream among the ranks; leave it off")
        args.ignore_data_skip = True  # the stream resumes by itself, see OrderedStreamCallback


def evaluation_loader(rows: Any, collate: Any, args: Any) -> DataLoader:
    """Load this rank's share of the rows, no row twice."""
    if isinstance(collate, OUR_COLLATORS):
        collate = dataclasses.replace(collate, allow_empty=True)
    if isinstance(rows, IterableDataset) or not hasattr(rows, "__len__"):
        rows = _EveryNth(rows)
    elif world_size() > 1:
        rows = Subset(rows, range(rank(), len(rows), world_size()))
    workers: dict[str, Any] = {}
    if args.dataloader_num_workers:
        # Not persistent: this loader is read once.
        names = ("prefetch_factor", "multiprocessing_context", "in_order")
        given = {name: getattr(args, f"dataloader_{name}", None) for name in names}
        workers = {name: value for name, value in given.items() if value is not None}
    return DataLoader(
        rows,
        batch_size=args.eval_batch_size,
        collate_fn=collate,
        num_workers=args.dataloader_num_workers,
        **workers,
        pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
        generator=torch.Generator(),  # without one it draws from the run's, and training goes another way
    )


class _EveryNth(IterableDataset):
    """This rank's rows of a stream: the n-th of every world_size rows, shared among loader workers."""

    def __init__(self, rows: Any) -> None:
        self._rows, self._rank, self._world = rows, rank(), world_size()

    def __iter__(self) -> Iterator[Any]:
        worker = torch.utils.data.get_worker_info()
        workers, number = (worker.num_workers, worker.id) if worker else (1, 0)
        own = self._rank * workers + number
        return (row for i, row in enumerate(self._rows) if i % (self._world * workers) == own)
