"""One segment to its shards: read, hold out, encode, pack, write, and count every token on the way."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset
from numpy.typing import NDArray

from hf_objectives.errors import DataError
from hf_objectives.labels import (
    SKIPPED,
    TOO_LONG,
    UNSUPERVISED,
    BatchEncoder,
    Ledger,
    text_encoder,
    token_byte_lengths,
)
from hf_objectives.packing import flat_column, pack_table
from hf_objectives.preparation.config import CorpusConfig
from hf_objectives.preparation.files import Segment
from hf_objectives.preparation.readers import Records, Skipped, read_segment
from hf_objectives.preparation.shards import PROGRESS, Shard, ShardWriter, check_types, smallest_type
from hf_objectives.preparation.splits import ROWS_READ, SPLITS, draw_rows, rows_between
from hf_objectives.types import IGNORE_INDEX, parse_json

_ROWS_PACKED = 512  # rows of documents that are packed together at least: fewer leave rows half full


@dataclass(frozen=True, slots=True)
class Finished:
    """The result of a segment: its key, shards, ledgers by split as `Ledger.to_dict` gives them, and unreadable records."""

    key: str
    shards: list[Shard]
    ledgers: dict[str, dict[str, Any]]
    skipped: Skipped

    @property
    def left_out(self) -> bool:
        """Whether a record that could not be used was skipped."""
        accounts = (account for ledger in self.ledgers.values() for account in ledger.values())
        return self.skipped.count > 0 or any(
            r.endswith(SKIPPED) for account in accounts for r in account["dropped_rows"]
        )

    def write(self, folder: Path) -> None:
        """Write it, whole or not at all."""
        draft = folder / PROGRESS / f"{self.key}.draft"
        draft.write_text(json.dumps(asdict(self)))
        draft.replace(draft.with_suffix(".json"))

    @classmethod
    def read(cls, file: Path) -> Finished:
        """What `write` wrote; a ValueError where it is damaged."""
        try:
            values = parse_json(file.read_bytes())
            done = cls(
                values["key"],
                [Shard(**shard) for shard in values["shards"]],
                values["ledgers"],
                Skipped(**values["skipped"]),
            )
            for part in (done, done.skipped, *done.shards):
                check_types(part)
            for ledger in done.ledgers.values():
                for account in Ledger.from_dict(ledger).accounts.values():
                    check_types(account)
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{file} is damaged ({type(error).__name__}: {error})") from error
        return done


@dataclass
class Work:
    """Turns segments into shards in a folder; picklable, so that it can go to another process or machine.

    Attributes:
        policy: the options and the tokenizer, as text.
        with_labels: whether shards hold `labels`.
        datasets: the datasets that segments name, by path.
    """

    tokenizer: Any
    config: CorpusConfig
    folder: Path
    policy: str
    with_labels: bool
    datasets: Mapping[str, Dataset] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_encoder", "_byte_lengths")}

    @cached_property
    def _encoder(self) -> BatchEncoder:
        return BatchEncoder(self.tokenizer, self.config.encoding(), on_error=self.config.on_error)

    @cached_property
    def _byte_lengths(self) -> NDArray[np.int32]:
        return token_byte_lengths(self.tokenizer).astype(np.int32)

    def warm_up(self) -> None:
        """Build what every segment needs, so that forked processes inherit it instead of each building its own."""
        text_encoder(self.tokenizer)
        _ = self._byte_lengths, self._encoder

    def __call__(self, segment: Segment) -> Finished:
        """Prepare a segment; its shards are in place and its account is written when this returns."""
        key = segment_key(segment, self.policy)
        ledgers, skipped = {split: Ledger() for split in SPLITS}, Skipped()
        source = "".join(
            c if c.isalnum() or c in "._" else "_" for c in segment.source[:40]
        )  # a file name has 255 bytes
        paths = {split: f"{split}/{source}-{key}.{self.config.file_format}" for split in SPLITS}
        types = {
            "input_ids": smallest_type(len(self._byte_lengths)),
            "position_ids": smallest_type(self.config.max_length),
        }
        writers = {split: ShardWriter(self.folder, paths[split], self.config.file_format, types) for split in SPLITS}
        with writers["train"], writers["validation"]:
            for split, documents in self._documents(segment, ledgers, skipped):
                rows = self._pack(documents, ledgers[split])
                if rows.num_rows:
                    writers[split].write(rows)
        shards = []
        for split, writer in writers.items():
            total, names = ledgers[split].total(), {"source": segment.source, "file": segment.path}
            tokens = {"tokens": total.trained + total.masked, "supervised": total.trained}
            if shard := writer.finish(path=paths[split], split=split, **names, **tokens):
                shards.append(shard)
        done = Finished(key, shards, {split: ledger.to_dict() for split, ledger in ledgers.items()}, skipped)
        done.write(self.folder)
        return done

    def _documents(
        self, segment: Segment, ledgers: Mapping[str, Ledger], skipped: Skipped
    ) -> Iterator[tuple[str, pa.Table]]:
        """Yield tables of encoded documents, each of one split and large enough to be packed well."""
        pending: dict[str, list[pa.Table]] = {split: [] for split in SPLITS}
        tokens = dict.fromkeys(SPLITS, 0)
        for records in self._records(segment, skipped if self.config.on_error == "skip" else None):
            for split, part in self._split(records):
                try:
                    table, booked = self._encoder.encode(part.rows, source=segment.source, numbers=part.numbers)
                except DataError as error:
                    error.reason = f"{error.reason} ({segment.place(error.row)})"
                    raise
                for account in booked.accounts.values():  # what is kept is counted when it is packed
                    tokens[split] += account.trained + account.masked
                    account.trained = account.masked = 0
                ledgers[split].merge(booked)
                pending[split].append(table)
                if tokens[split] >= _ROWS_PACKED * self.config.max_length:
                    yield split, concatenated(pending[split])
                    pending[split], tokens[split] = [], 0
        yield from ((split, concatenated(tables)) for split, tables in pending.items() if tables)

    def _records(self, segment: Segment, skipped: Skipped | None) -> Iterator[Records]:
        dataset = self.datasets.get(segment.path)
        if dataset is None:
            yield from read_segment(segment, skipped=skipped)
            return
        assert segment.end is not None  # datasets are cut by row
        for begin in range(segment.begin, segment.end, ROWS_READ):
            end = min(segment.end, begin + ROWS_READ)
            yield Records(rows_between(dataset, begin, end), list(range(begin, end)))

    def _split(self, records: Records) -> Iterator[tuple[str, Records]]:
        """The records to train on and those that are held out, as `hold_out` would choose them."""
        if not self.config.eval_share:
            yield "train", records
            return
        held = draw_rows(records.rows, self.config.eval_seed) < self.config.eval_share
        yield from (
            (split, records.part(side)) for split, side in zip(SPLITS, (~held, held), strict=True) if side.any()
        )

    def _pack(self, documents: pa.Table, ledger: Ledger) -> pa.Table:
        """Pack documents, and count in the ledger what packing keeps and what it leaves out."""
        config = self.config
        how = {"strategy": config.strategy, "overflow": config.overflow}
        rows = pack_table(documents, config.max_length, **how, labels=self.with_labels, allow_empty=True)
        kept = _count(rows, self._byte_lengths)
        sizes = np.diff(flat_column(documents, "input_ids")[1])
        too_long = np.maximum(sizes - config.max_length, 0)
        if config.overflow == "drop":
            too_long = np.where(too_long > 0, sizes, 0)
        if config.overflow == "split" or config.strategy == "concat":
            too_long[:] = 0
        for name, chosen in _by_source(documents["source"].combine_chunks()):
            long, account = int(too_long[chosen].sum()), kept[name]
            rest = int(sizes[chosen].sum()) - long - account.trained - account.masked
            for reason, lost in ((TOO_LONG, long), (UNSUPERVISED, rest)):
                if lost:
                    ledger[name].dropped_tokens[reason] += lost
        ledger.merge(kept)
        return rows


def segment_key(segment: Segment, policy: str) -> str:
    """Name a segment under a policy: the same key, the same shard."""
    where = (segment.source, segment.path, segment.begin, segment.end, segment.first, segment.size, segment.mtime_ns)
    return hashlib.sha256(json.dumps([policy, *where, segment.documents]).encode()).hexdigest()[:20]


def cut_dataset(source: str, path: str, dataset: Dataset, shard_bytes: int) -> list[Segment]:
    """Cut a dataset into segments of about `shard_bytes`."""
    per_row = max(1, dataset.data.nbytes // max(1, len(dataset.data)))
    rows = max(ROWS_READ, shard_bytes // per_row)
    bounds = [*range(0, len(dataset), rows), len(dataset)]
    return [Segment(source, path, a, b, a, len(dataset), 0) for a, b in itertools.pairwise(bounds)]


def concatenated(tables: list[pa.Table]) -> pa.Table:
    """Join tables of encoded documents; a table without `labels` gets its `input_ids` for labels where others have some."""
    if any("labels" in table.column_names for table in tables):
        tables = [
            table if "labels" in table.column_names else table.add_column(1, "labels", table["input_ids"])
            for table in tables
        ]
    return pa.concat_tables(tables)


def _by_source(column: pa.StringArray) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    codes = column.dictionary_encode()
    for i, name in enumerate(codes.dictionary.to_pylist()):
        yield name, codes.indices.to_numpy() == i


def _count(rows: pa.Table, byte_lengths: NDArray[np.int32]) -> Ledger:
    """Count tokens, trained tokens and bytes of text in packed rows, per source."""
    ledger = Ledger()
    if not rows.num_rows:
        return ledger
    ids, _ = flat_column(rows, "input_ids")
    lengths, _ = flat_column(rows, "seq_lengths")
    pieces = dict(_by_source(rows["sources"].combine_chunks().flatten().filter(pa.array(lengths > 0))))
    lengths = lengths[lengths > 0]
    begins = np.cumsum(lengths, dtype=np.int64) - lengths
    trained = lengths - 1
    if "labels" in rows.column_names:
        trained = np.add.reduceat(flat_column(rows, "labels")[0] != IGNORE_INDEX, begins, dtype=np.int64)
    num_bytes = np.add.reduceat(_look_up(byte_lengths, ids), begins, dtype=np.int64)
    for name, chosen in pieces.items():
        account = ledger[name]
        account.trained = int(trained[chosen].sum())
        account.masked = int(lengths[chosen].sum()) - account.trained
        account.num_bytes = int(num_bytes[chosen].sum())
    return ledger


def _look_up(values: NDArray[np.int32], ids: NDArray[np.int32]) -> NDArray[np.int32]:
    """`values[ids]` in parts, so that the wide index that numpy makes of the ids stays in the cache."""
    found = np.empty(len(ids), values.dtype)
    for begin in range(0, len(ids), 1 << 16):
        found[begin : begin + (1 << 16)] = values.take(ids[begin : begin + (1 << 16)])  # an unknown id is an error
    return found
