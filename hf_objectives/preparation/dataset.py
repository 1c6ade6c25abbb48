"""A dataset in any accepted format to encoded, labelled and packed rows: in memory, or to shards on disk."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Unpack

import numpy as np
import pyarrow as pa
from datasets import Dataset
from tqdm.auto import tqdm

from hf_objectives.errors import ConfigError, NothingSupervisedError
from hf_objectives.labels import BatchEncoder, EncodingConfig, EncodingOptions, Ledger, text_encoder
from hf_objectives.packing import check_packing, pack_table
from hf_objectives.preparation.config import CorpusConfig
from hf_objectives.preparation.corpus import load_prepared, prepare_corpus
from hf_objectives.preparation.readers import load_rows, naming_places
from hf_objectives.preparation.splits import rows_between
from hf_objectives.preparation.token_file import TokenFile
from hf_objectives.preparation.work import concatenated
from hf_objectives.preparation.workers import ENGINES, count_cores, run_local
from hf_objectives.types import IGNORE_INDEX, Row, check_one_of

logger = logging.getLogger(__name__)

_BATCH = 2_000  # rows encoded at a time: enough to keep the tokenizer's threads busy, and little memory
# Number of the first row, and the rows; None where a worker can look them up itself.
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
    source: str = "data",
    ledger: Ledger | None = None,
    **options: Unpack[EncodingOptions],
) -> Dataset:
    """Encode, label and pack a dataset.

    Args:
        dataset: a `datasets.Dataset` or rows, each source in one format; a row's `source` column names its source. A path,
            a glob or a Hub id, or a mapping of source names to these, is loaded first.
        tokenizer: a fast transformers tokenizer.
        max_length: most tokens of a row; None only without packing.
        packing: pack several documents into a row of `max_length` tokens.
        strategy, overflow: see `pack_dataset`; with packing, `overflow` decides about texts longer than a row.
        num_proc: worker processes; None for one per core on large inputs.
        engine: "local", or "ray" for a Ray cluster, which needs `output_dir`.
        output_dir: write shards to this folder in constant memory, and map them (`prepare_corpus`); None works in memory.
        source: name of the source of rows that name none.
        ledger: counts what happens to every token.
        options: `train_on`, `control_tokens`, `overlength`, `expand_turns`, `chat_template` and `template_kwargs`; see
            `EncodingConfig`.

    Returns:
        A dataset with `input_ids`, `labels`, `source` and `row` (the row's number in its source). Packed rows have
        `seq_lengths`, `sources` and `rows`, one entry per document. Every row has at least one trained token.

    Raises:
        DataError: a row cannot be used; names source, row and turn.
        NothingSupervisedError: no row is left.
        ConfigError: a setting is unknown.
        WorkerError: a worker process died.
    """
    check_one_of("engine", engine, ENGINES)
    if engine != "local" and output_dir is None:
        raise ConfigError(f"engine={engine!r} writes shards; give it an output_dir that all machines see")
    if packing:
        check_packing(max_length, strategy, overflow)
    if output_dir is None:
        config = EncodingConfig(max_length=max_length, splits_documents=packing, **options)  # type: ignore[arg-type]
        with naming_places(_paths(dataset, source)):
            encoded = encode_rows(_rows(dataset), tokenizer, config, source=source, num_proc=num_proc, ledger=ledger)
        pack: Any = {"strategy": strategy, "overflow": overflow}
        return Dataset(pack_table(encoded, max_length or 0, **pack) if packing else _without_first_labels(encoded))
    if not packing or options.pop("template_kwargs", None) or ledger is not None:
        raise ConfigError("output_dir gets packed rows and a manifest: no packing=False, template_kwargs or ledger")
    corpus = CorpusConfig(max_length or 0, strategy, overflow, num_proc=num_proc, engine=engine, **options)  # type: ignore[arg-type]
    prepare_corpus(_named(dataset, source), tokenizer, output_dir, corpus)
    prepared = load_prepared(output_dir)
    assert isinstance(prepared, Dataset)  # not a stream
    return prepared


def _without_first_labels(table: pa.Table) -> pa.Table:
    """The labels of encoded rows without the first of each row, which nothing predicts; packing does the same."""
    labels = table["labels"].combine_chunks()
    values, offsets = labels.values.to_numpy().copy(), labels.offsets
    starts = offsets.to_numpy()
    values[starts[:-1][np.diff(starts) > 0]] = IGNORE_INDEX
    return table.set_column(table.column_names.index("labels"), "labels", type(labels).from_arrays(offsets, values))


def _rows(dataset: Dataset | Iterable[Row] | str | Mapping[str, Any]) -> Dataset | Iterable[Row]:
    if isinstance(dataset, str):
        return load_rows(dataset)
    if isinstance(dataset, Mapping):
        return [
            {"row": i, **row, "source": name} for name, path in dataset.items() for i, row in enumerate(load_rows(path))
        ]
    return dataset


def _paths(dataset: Any, source: str) -> Mapping[str, str]:
    return {source: dataset} if isinstance(dataset, str) else dataset if isinstance(dataset, Mapping) else {}


def _named(dataset: Any, source: str) -> Mapping[str, Any]:
    if isinstance(dataset, Mapping):
        return dataset
    if isinstance(dataset, (str, Dataset)):
        return {source: dataset}
    raise ConfigError(f"output_dir needs files or a datasets.Dataset to go back to, found {type(dataset).__name__}")


def encode_rows(
    dataset: Dataset | Iterable[Row],
    tokenizer: Any,
    config: EncodingConfig,
    *,
    source: str,
    num_proc: int | None = None,
    ledger: Ledger | None = None,
    on_error: str = "raise",
    folder: Path | None = None,
) -> pa.Table:
    """Encode all rows without packing them: `input_ids`, `labels`, `source` and `row`; see `prepare_dataset`.

    `on_error="skip"` counts a row that cannot be used in the ledger, and leaves it out. With a `folder`, the table is
    memory-mapped from temporary files there; without one, it is in memory.
    """
    ledger = Ledger() if ledger is None else ledger
    work = _Encoding(BatchEncoder(tokenizer, config, on_error=on_error), source, dataset)
    size = len(dataset) if isinstance(dataset, (Dataset, Sequence)) else 0
    results = run_local(work, work.batches(), num_proc or max(1, min(count_cores(), size // (4 * _BATCH))))
    batches = -(-size // _BATCH) if size else None
    tables: list[pa.Table] = []
    file = None if folder is None else TokenFile(folder)
    for table, booked in _in_order(tqdm(results, total=batches, desc="Encoding", unit="batch", delay=5, disable=None)):
        ledger.merge(booked)
        if table.num_rows:
            tables.append(table) if file is None else file.write(table)
    total = ledger.total()
    if not total.trained:
        raise NothingSupervisedError(
            f"no token of {total.rows_in} rows would be trained; {'; '.join(ledger.lines()) or 'the dataset is empty'}"
        )
    logger.info("encoded with %s: %s", text_encoder(tokenizer).backend, "; ".join(ledger.lines()))
    return concatenated(tables) if file is None else file.table()


def _in_order(results: Iterable[tuple[int, pa.Table, Ledger]]) -> Iterator[tuple[pa.Table, Ledger]]:
    """Encoded batches in the order of their rows, whichever was ready first."""
    waiting: dict[int, tuple[pa.Table, Ledger]] = {}
    first = 0
    for number, table, booked in results:
        waiting[number] = table, booked
        while first in waiting:
            yield waiting.pop(first)
            first += _BATCH


@dataclass(frozen=True, slots=True)
class _Encoding:
    """Encodes batches; forked workers inherit it, with dataset and tokenizer."""

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

    def __call__(self, batch: Batch) -> tuple[int, pa.Table, Ledger]:
        first, rows = batch
        if rows is None:
            assert isinstance(self.dataset, (Dataset, Sequence))
            rows = rows_between(self.dataset, first, first + _BATCH)
        return first, *self.encoder.encode(rows, source=self.source, numbers=range(first, first + len(rows)))
