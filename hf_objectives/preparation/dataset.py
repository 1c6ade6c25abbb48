"""A dataset in any accepted format to encoded, labelled and packed rows: in memory, or through the corpus engine to disk."""

from __future__ import annotations

import gc
import itertools
import logging
import multiprocessing
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from datasets import Dataset

from hf_objectives.errors import ConfigError, NothingSupervisedError, WorkerError, nearest
from hf_objectives.labels import BatchEncoder, EncodingConfig, Ledger, Overlength, text_encoder
from hf_objectives.packing import check_packing, pack_table
from hf_objectives.preparation.config import CorpusSettings
from hf_objectives.preparation.corpus import load_prepared, prepare_corpus
from hf_objectives.preparation.data_files import load_rows
from hf_objectives.preparation.work import concatenated
from hf_objectives.preparation.workers import ENGINES
from hf_objectives.types import Row

logger = logging.getLogger(__name__)

_BATCH = 2_000  # rows a step: enough to keep the tokenizer's threads busy, small enough that memory stays flat
# Number of the first row, and the rows, None where a worker can look them up itself.
Batch = tuple[int, list[Row] | None]


def prepare_dataset(
    dataset: Dataset | Iterable[Row] | str | Mapping[str, Any],
    tokenizer: Any,
    *,
    max_length: int | None,
    packing: bool = True,
    strategy: str = "best_fit",
    overflow: str = "split",
    num_proc: int | None = None,
    engine: Literal["local", "ray"] = "local",
    output_dir: str | Path | None = None,
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
        dataset: a `datasets.Dataset` or rows, all of one format a source; a row's `source` column names its source. A path,
            a glob or a Hub id, or a mapping of source names to these, is read from there.
        tokenizer: a fast transformers tokenizer.
        max_length: most tokens a row may have; None only without packing.
        packing: pack several documents into a row of `max_length` tokens.
        strategy, overflow: see `pack_dataset`; under packing `overflow` decides for texts longer than a row.
        num_proc: worker processes; None for one per core on large inputs.
        engine: "local", or "ray" for a Ray cluster, which needs `output_dir`.
        output_dir: prepare to shards in this folder, in constant memory, and map them (see `prepare_corpus`); None to work
            in memory.
        overlength: what becomes of a row longer than `max_length`: "drop" leaves it out; "split_turns" makes rows of
            whole user turns of it, each with the system message; "cut" cuts it off, and a turn that the cut goes through
            is not trained at all.
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
        WorkerError: a worker process died.
    """
    _check_engine(engine, output_dir)
    if packing:
        if max_length is None:
            raise ConfigError("packing needs max_length, the number of tokens a packed row holds")
        check_packing(max_length, strategy, overflow)
    if output_dir is not None:
        if not packing or template_kwargs or ledger is not None:
            raise ConfigError("output_dir gets packed rows and a manifest: no packing=False, template_kwargs or ledger")
        corpus = CorpusSettings(
            max_length or 0, strategy, overflow, overlength, train_on, control_tokens, expand_turns, chat_template,
            num_proc=num_proc, engine=engine,
        )  # fmt: skip
        prepare_corpus(_named(dataset, source), tokenizer, output_dir, corpus)
        return load_prepared(output_dir)
    settings = EncodingConfig(
        max_length=max_length,
        train_on=train_on,
        control_tokens=control_tokens,
        overlength=overlength,
        expand_turns=expand_turns,
        chat_template=chat_template,
        template_kwargs=dict(template_kwargs or {}),
        splits_documents=packing,
    )
    encoded = encode_rows(_rows(dataset), tokenizer, settings, source=source, num_proc=num_proc, ledger=ledger)
    if not packing:
        return Dataset(encoded)
    return Dataset(pack_table(encoded, max_length or 0, strategy=strategy, overflow=overflow))


def _check_engine(engine: str, output_dir: Any) -> None:
    if engine not in ENGINES:
        raise ConfigError(f"engine is {engine!r}; expected one of {', '.join(ENGINES)}{nearest(engine, ENGINES)}")
    if engine != "local" and output_dir is None:
        raise ConfigError(f"engine={engine!r} writes shards; give it an output_dir that all machines see")


def _rows(dataset: Dataset | Iterable[Row] | str | Mapping[str, Any]) -> Dataset | Iterable[Row]:
    if isinstance(dataset, str):
        return load_rows(dataset)
    if isinstance(dataset, Mapping):
        return [{**row, "source": name} for name, path in dataset.items() for row in load_rows(path)]
    return dataset


def encode_rows(
    dataset: Dataset | Iterable[Row],
    tokenizer: Any,
    settings: EncodingConfig,
    *,
    source: str,
    num_proc: int | None = None,
    ledger: Ledger | None = None,
) -> pa.Table:
    """All rows, encoded but not packed: `input_ids`, `labels`, `source` and `row`; see `prepare_dataset`."""
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
    logger.info("encoded with %s: %s", text_encoder(tokenizer).backend, "; ".join(ledger.lines()))
    return concatenated([table for table in tables if table.num_rows])


def _named(dataset: Any, source: str) -> Mapping[str, Any]:
    if isinstance(dataset, Mapping):
        return dataset
    if isinstance(dataset, (str, Dataset)):
        return {source: dataset}
    raise ConfigError(f"output_dir needs files or a datasets.Dataset to go back to, found {type(dataset).__name__}")


def _encoded(
    dataset: Dataset | Iterable[Row], tokenizer: Any, settings: EncodingConfig, source: str, num_proc: int | None
) -> Iterator[tuple[pa.Table, Ledger]]:
    """Tables of encoded rows with their ledgers, in the order of the dataset."""
    rows = dataset.with_format("arrow") if isinstance(dataset, Dataset) else dataset
    work = _Work(BatchEncoder(tokenizer, settings), source, rows)
    size = len(dataset) if isinstance(dataset, (Dataset, Sequence)) else 0
    workers = num_proc or (min(os.cpu_count() or 1, size // (4 * _BATCH)) if size else 1)
    if workers <= 1 or not hasattr(os, "fork"):
        yield from map(work, work.batches())
        return
    # Forked workers inherit rows and tokenizer; the tokenizer's threads start in each worker, not here, because a
    # thread pool does not survive a fork.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), _adopt, (work,)) as pool:
        try:
            yield from _in_order(pool, work.batches(), in_flight=2 * workers)
        except BrokenProcessPool as error:
            raise WorkerError(
                f"one of {workers} worker processes died while encoding; if memory ran out, use fewer (num_proc)"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _in_order(pool: ProcessPoolExecutor, batches: Iterator[Batch], in_flight: int) -> Iterator[tuple[pa.Table, Ledger]]:
    """Results in the order of the batches; no more in flight than keeps the workers busy, so that memory stays flat."""
    pending: deque[Future[tuple[pa.Table, Ledger]]] = deque()
    for batch in batches:
        pending.append(pool.submit(_encode_adopted, batch))
        if len(pending) > in_flight:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


@dataclass(frozen=True, slots=True)
class _Work:
    """What turns batches into tables of encoded rows; forked workers inherit it, dataset and tokenizer with it."""

    encoder: BatchEncoder
    source: str
    dataset: Dataset | Iterable[Row]

    def batches(self) -> Iterator[Batch]:
        if isinstance(self.dataset, (Dataset, Sequence)):
            yield from ((first, None) for first in range(0, len(self.dataset), _BATCH))
            return
        rows, first = iter(self.dataset), 0
        while batch := list(itertools.islice(rows, _BATCH)):
            yield first, batch
            first += len(batch)

    def __call__(self, batch: Batch) -> tuple[pa.Table, Ledger]:
        first, rows = batch
        if rows is None:
            assert isinstance(self.dataset, (Dataset, Sequence))
            looked_up = self.dataset[first : first + _BATCH]
            rows = looked_up.to_pylist() if isinstance(looked_up, pa.Table) else list(looked_up)
        return self.encoder.encode(rows, source=self.source, numbers=range(first, first + len(rows)))


_adopted: _Work | None = None


def _adopt(work: _Work) -> None:
    global _adopted
    _adopted = work
    # What was inherited is never garbage here: the collector need not walk it, which would also copy its pages.
    gc.freeze()


def _encode_adopted(batch: Batch) -> tuple[pa.Table, Ledger]:
    assert _adopted is not None  # set by _adopt in every worker
    return _adopted(batch)


def token_count(dataset: Dataset) -> tuple[int, int]:
    """Number of tokens and of trained tokens in an encoded dataset."""
    labels = dataset.with_format("arrow")[:]["labels"].combine_chunks()
    values = labels.flatten().to_numpy()
    return len(values), int(np.count_nonzero(values != -100))
