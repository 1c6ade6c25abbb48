"""A dataset in any accepted format to encoded, labelled and packed rows."""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from datasets import Dataset, concatenate_datasets

from hf_objectives.chat import Labelled
from hf_objectives.dataset_packing import pack_dataset
from hf_objectives.encode import Overlength, RowEncoder, RowSettings
from hf_objectives.errors import ConfigError, NothingSupervisedError
from hf_objectives.formats import Row
from hf_objectives.ledger import Ledger
from hf_objectives.tokenization import text_encoder

logger = logging.getLogger(__name__)

_BATCH = 2_000  # rows a step: enough to keep the tokenizer's threads busy, small enough that memory stays flat


def prepare_dataset(
    dataset: Dataset | Iterable[Row],
    tokenizer: Any,
    *,
    max_length: int | None,
    packing: bool = True,
    strategy: str = "best_fit",
    num_proc: int | None = None,
    engine: Literal["local"] = "local",
    overlength: Overlength = "drop",
    train_on: str = "assistant",
    control_tokens: str = "plain",
    expand_turns: bool = False,
    chat_template: str | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    source: str = "data",
    ledger: Ledger | None = None,
) -> Dataset:
    """Encode, label and pack a dataset.

    Args:
        dataset: a `datasets.Dataset` or rows, all of one format a source; a row's `source` column names its source.
        tokenizer: a fast transformers tokenizer.
        max_length: most tokens a row may have; None only without packing.
        packing: pack several documents into a row of `max_length` tokens.
        strategy: "best_fit" (whole documents) or "concat" (a continuous stream).
        num_proc: worker processes; None for one per core on large inputs.
        engine: "local".
        overlength: what becomes of a row longer than `max_length`: "drop" leaves it out; "split_turns" makes rows of
            whole user turns of it, each with the system message; "cut" cuts it off, and a turn that the cut goes through
            is not trained at all. Documents (`text`) are split into pieces under packing whatever the policy.
        train_on, control_tokens, chat_template, template_kwargs: see `encode_chat`.
        expand_turns: one row per user turn, each with exactly the prompt of inference; for templates that drop the
            reasoning of earlier turns.
        source: name of the source of rows that name none.
        ledger: is given what became of every token.

    Returns:
        A dataset with `input_ids`, `labels`, `source` and `row` (its number in the source); when packed, with
        `seq_lengths`, `sources` and `rows`, one entry per document. Every row has at least one trained token.

    Raises:
        DataError: a row that cannot be used; names source, row and turn.
        NothingSupervisedError: no row is left.
        ConfigError: an unknown setting.
    """
    if engine != "local":
        raise ConfigError(f"engine is {engine!r}; expected 'local'")
    if packing and max_length is None:
        raise ConfigError("packing needs max_length, the number of tokens a packed row holds")
    settings = RowSettings(
        max_length, train_on, control_tokens, overlength, expand_turns, chat_template, dict(template_kwargs or {})
    )
    ledger = Ledger() if ledger is None else ledger
    tables = []
    for table, booked in _encoded(dataset, tokenizer, settings, source, num_proc):
        tables.append(table)
        ledger.merge(booked)
    total = ledger.total()
    if not total.trained:
        raise NothingSupervisedError(
            f"no token of {total.rows_in} rows would be trained; {'; '.join(ledger.lines()) or 'the dataset is empty'}"
        )
    encoded = concatenate_datasets([Dataset(table) for table in tables if table.num_rows])
    logger.info("encoded with %s: %s", text_encoder(tokenizer).backend, "; ".join(ledger.lines()))
    if not packing:
        return encoded
    assert max_length is not None
    return pack_dataset(encoded, max_length, strategy=strategy)


def _encoded(
    dataset: Dataset | Iterable[Row], tokenizer: Any, settings: RowSettings, source: str, num_proc: int | None
) -> Iterator[tuple[pa.Table, Ledger]]:
    """Tables of encoded rows with their ledgers, in the order of the dataset."""
    encoder = RowEncoder(tokenizer, settings)
    batches = _batches(dataset)
    size = len(dataset) if isinstance(dataset, (Dataset, Sequence)) else 0
    workers = num_proc or (min(os.cpu_count() or 1, size // (4 * _BATCH)) if size else 1)
    if workers <= 1 or not hasattr(os, "fork"):
        for first, rows in batches:
            yield _encode(encoder, rows, first, source)
        return
    # Forked workers inherit rows and tokenizer; the tokenizer's threads start in each worker, not here, because a
    # thread pool does not survive a fork.
    with _Workers(encoder, source, workers) as pool:
        yield from pool.run(batches)


class _Workers:
    """A pool of forked processes that encode batches in order."""

    def __init__(self, encoder: RowEncoder, source: str, workers: int) -> None:
        self._pool = multiprocessing.get_context("fork").Pool(workers, _adopt, (encoder, source))

    def __enter__(self) -> _Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.terminate()

    def run(self, batches: Iterator[tuple[int, list[Row]]]) -> Iterator[tuple[pa.Table, Ledger]]:
        """Results in the order of the batches."""
        yield from self._pool.imap(_encode_adopted, batches)


_adopted: tuple[RowEncoder, str] | None = None


def _adopt(encoder: RowEncoder, source: str) -> None:
    global _adopted
    _adopted = encoder, source


def _encode_adopted(batch: tuple[int, list[Row]]) -> tuple[pa.Table, Ledger]:
    assert _adopted is not None  # set by _adopt in every worker
    encoder, source = _adopted
    return _encode(encoder, batch[1], batch[0], source)


def _encode(encoder: RowEncoder, rows: Sequence[Row], first: int, source: str) -> tuple[pa.Table, Ledger]:
    ledger = Ledger()
    labelled, sources, numbers = encoder.encode(rows, source=source, first_row=first, ledger=ledger)
    return _table(labelled, sources, numbers), ledger


def _table(labelled: Labelled, sources: Sequence[str], numbers: Sequence[int]) -> pa.Table:
    table = labelled.to_table().append_column("source", pa.array(sources, pa.string()))
    return table.append_column("row", pa.array(numbers, pa.int64()))


def _batches(dataset: Dataset | Iterable[Row]) -> Iterator[tuple[int, list[Row]]]:
    """(number of the first row, rows), batch by batch."""
    if isinstance(dataset, Dataset):
        arrow = dataset.with_format("arrow")
        for first in range(0, len(dataset), _BATCH):
            yield first, arrow[first : first + _BATCH].to_pylist()
        return
    batch: list[Row] = []
    first = 0
    for row in dataset:
        batch.append(row)
        if len(batch) == _BATCH:
            yield first, batch
            first += len(batch)
            batch = []
    if batch:
        yield first, batch


def token_count(dataset: Dataset) -> tuple[int, int]:
    """Number of tokens and of trained tokens in an encoded dataset."""
    labels = dataset.with_format("arrow")[:]["labels"].combine_chunks()
    values = labels.flatten().to_numpy()
    return len(values), int(np.count_nonzero(values != -100))
