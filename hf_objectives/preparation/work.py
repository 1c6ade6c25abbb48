"""One segment to its shards: read, encode, hold out, pack, write, and account for every token on the way."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
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
    Account,
    BatchEncoder,
    Ledger,
    text_encoder,
    token_byte_lengths,
)
from hf_objectives.packing import flat_column, pack_table
from hf_objectives.preparation.config import CorpusSettings
from hf_objectives.preparation.readers import Records, Segment, Skipped, read_segment
from hf_objectives.preparation.shards import PROGRESS, Shard, ShardWriter, id_type
from hf_objectives.types import IGNORE_INDEX

SPLITS = ("train", "validation")
_ROWS_PACKED = 512  # rows of documents that are packed together at least: fewer leave rows half full
_ROWS_READ = 2_000


@dataclass(frozen=True, slots=True)
class Finished:
    """What became of a segment: its shards, and the accounts of its sources.

    Attributes:
        key: names segment and policy, see `segment_key`.
        shards: what was written.
        accounts: by source, see `SourceAccount`.
        broken: records that could not be read and were left out, and the first few in words.
    """

    key: str
    shards: list[Shard]
    accounts: dict[str, dict[str, Any]]
    broken: int
    broken_named: list[str]

    @property
    def left_out(self) -> bool:
        """Whether a record that could not be used was skipped."""
        dropped = (reason for account in self.accounts.values() for reason in account["dropped_documents"])
        return self.broken > 0 or any(reason.endswith(SKIPPED) for reason in dropped)

    def to_json(self) -> str:
        """As JSON text."""
        return json.dumps({**{name: getattr(self, name) for name in ("key", "accounts", "broken", "broken_named")},
                           "shards": [shard.to_dict() for shard in self.shards]})  # fmt: skip

    @classmethod
    def from_json(cls, text: str | bytes) -> Finished:
        """From JSON text."""
        read = json.loads(text)
        return cls(**{**read, "shards": [Shard(**shard) for shard in read["shards"]]})


@dataclass
class Work:
    """Turns segments into shards; picklable, so that it can go to another process or machine.

    Attributes:
        tokenizer: the tokenizer.
        settings: how documents become rows.
        folder: where shards go.
        policy: digest of the settings and the tokenizer.
        with_labels: whether shards hold `labels`.
        datasets: the datasets that segments name, by path.
    """

    tokenizer: Any
    settings: CorpusSettings
    folder: Path
    policy: str
    with_labels: bool
    datasets: Mapping[str, Dataset] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        hidden = ("_encoder", "_byte_lengths")
        return {name: value for name, value in self.__dict__.items() if name not in hidden}

    @cached_property
    def _encoder(self) -> BatchEncoder:
        return BatchEncoder(self.tokenizer, self.settings.row_settings(), on_error=self.settings.on_error)

    @cached_property
    def _byte_lengths(self) -> NDArray[np.int32]:
        return token_byte_lengths(self.tokenizer).astype(np.int32)

    def warm_up(self) -> None:
        """Build what every segment needs, so that forked processes inherit it instead of each building its own."""
        text_encoder(self.tokenizer)
        _ = self._byte_lengths, self._encoder

    def __call__(self, segment: Segment) -> Finished:
        """Prepare a segment; its shards are in place and its account is written when this returns.

        Raises:
            DataError: a record that cannot be used, unless errors are skipped.
            DiskFullError: no space is left.
        """
        key = segment_key(segment, self.policy)
        ledger, skipped = Ledger(), Skipped() if self.settings.on_error == "skip" else None
        packed = {split: Ledger() for split in SPLITS}
        name = f"{_file_name(segment.source)}-{key}.{self.settings.file_format}"
        kind = id_type(len(self._byte_lengths))
        writers = {
            split: ShardWriter(self.folder, f"{split}/{name}", self.settings.file_format, kind) for split in SPLITS
        }
        with writers["train"], writers["validation"]:
            for table in self._encoded(segment, ledger, skipped):
                for split, part in self._split(table, segment):
                    rows = self._pack(part, ledger, packed[split])
                    if rows.num_rows:
                        writers[split].write(rows)
        shards = []
        for split, writer in writers.items():
            total = packed[split].total()
            about = {"path": f"{split}/{name}", "split": split, "source": segment.source, "file": segment.path}
            shard = writer.finish(**about, tokens=total.trained + total.masked, supervised=total.trained)
            shards += [shard] if shard else []
        done = Finished(
            key,
            shards,
            _accounts(ledger, packed),
            skipped.count if skipped else 0,
            skipped.named if skipped else [],
        )
        draft = self.folder / PROGRESS / f"{key}.draft"
        draft.write_text(done.to_json())
        draft.replace(draft.with_suffix(".json"))
        return done

    def _encoded(self, segment: Segment, ledger: Ledger, skipped: Skipped | None) -> Iterator[pa.Table]:
        """Tables of encoded documents, each large enough to be packed well."""
        pending: list[pa.Table] = []
        tokens = 0
        for records in self._records(segment, skipped):
            try:
                table, booked = self._encoder.encode(records.rows, source=segment.source, numbers=records.numbers)
            except DataError as error:
                error.reason = f"{error.reason} ({segment.place(error.row)})"
                raise
            ledger.merge(booked)
            pending.append(table)
            tokens += booked.total().trained + booked.total().masked
            if tokens >= _ROWS_PACKED * self.settings.max_length:
                yield concatenated(pending)
                pending, tokens = [], 0
        if pending:
            yield concatenated(pending)

    def _records(self, segment: Segment, skipped: Skipped | None) -> Iterator[Records]:
        dataset = self.datasets.get(segment.path)
        if dataset is None:
            yield from read_segment(segment, skipped=skipped)
            return
        assert segment.end is not None  # datasets are cut by row
        rows = dataset.with_format("arrow")
        for begin in range(segment.begin, segment.end, _ROWS_READ):
            end = min(segment.end, begin + _ROWS_READ)
            yield Records(rows[begin:end].to_pylist(), list(range(begin, end)))

    def _split(self, table: pa.Table, segment: Segment) -> Iterator[tuple[str, pa.Table]]:
        """The documents to train on and those that are held out, which follows from seed, file and number alone."""
        if not self.settings.eval_share:
            yield "train", table
            return
        name = f"{self.settings.eval_seed} {segment.source} {Path(segment.path).name}"
        salt = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
        out = uniform(table["row"].to_numpy(), salt) < self.settings.eval_share
        yield "train", table.filter(pa.array(~out))
        yield "validation", table.filter(pa.array(out))

    def _pack(self, table: pa.Table, ledger: Ledger, packed: Ledger) -> pa.Table:
        """Packed rows; what packing leaves out is booked in `ledger`, what it keeps in `packed`."""
        settings = self.settings
        rows = pack_table(
            table,
            settings.max_length,
            strategy=settings.strategy,
            overflow=settings.overflow,
            labels=self.with_labels,
            allow_empty=True,
        )
        kept = _count(rows, self._byte_lengths)
        sizes = np.diff(flat_column(table, "input_ids")[1])
        over = sizes > settings.max_length if settings.overflow == "drop" else sizes < 0
        too_long = np.where(over, sizes, np.maximum(sizes - settings.max_length, 0))
        too_long *= settings.overflow != "split" and settings.strategy != "concat"
        for name, mine in _by_source(table["source"].combine_chunks()):
            long, account = int(too_long[mine].sum()), kept[name]
            rest = int(sizes[mine].sum()) - long - account.trained - account.masked
            if long:
                ledger[name].dropped_tokens[TOO_LONG] += long
            if rest:
                ledger[name].dropped_tokens[UNSUPERVISED] += rest
        packed.merge(kept)
        return rows


def segment_key(segment: Segment, policy: str) -> str:
    """Names a segment under a policy: the same key, the same shard."""
    where = (segment.source, segment.path, segment.begin, segment.end, segment.first, segment.size, segment.mtime_ns)
    return hashlib.sha256(json.dumps([policy, *where, segment.documents]).encode()).hexdigest()[:20]


def concatenated(tables: list[pa.Table]) -> pa.Table:
    """Tables of encoded documents as one; where some have no `labels`, all tokens of theirs are trained."""
    if any("labels" in table.column_names for table in tables):
        tables = [
            table if "labels" in table.column_names else table.add_column(1, "labels", table["input_ids"])
            for table in tables
        ]
    return pa.concat_tables(tables)


def uniform(numbers: NDArray[np.int64], salt: int) -> NDArray[np.float64]:
    """A number from 0 to 1 for each row number, by splitmix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    x = numbers.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(salt)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return (x ^ (x >> np.uint64(31))) / 2.0**64


def _file_name(source: str) -> str:
    return "".join(c if c.isalnum() or c in "._" else "_" for c in source)


def _by_source(column: pa.StringArray) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    codes = column.dictionary_encode()
    for i, name in enumerate(codes.dictionary.to_pylist()):
        yield name, codes.indices.to_numpy() == i


def _count(rows: pa.Table, byte_lengths: NDArray[np.int32]) -> Ledger:
    """Tokens, trained tokens and bytes of text in packed rows, by source."""
    ledger = Ledger()
    if not rows.num_rows:
        return ledger
    ids, _ = flat_column(rows, "input_ids")
    lengths, _ = flat_column(rows, "seq_lengths")
    of_piece = dict(_by_source(rows["sources"].combine_chunks().flatten().filter(pa.array(lengths > 0))))
    lengths = lengths[lengths > 0]
    begins = np.cumsum(lengths, dtype=np.int64) - lengths
    if len(of_piece) == 1:  # nearly always: one sum over all pieces
        begins, of_piece = begins[:1], dict.fromkeys(of_piece, np.ones(1, bool))
        trained, tokens = np.array([lengths.sum() - len(lengths)]), np.array([lengths.sum()])
    else:
        trained, tokens = lengths - 1, lengths
    if "labels" in rows.column_names:
        trained = np.add.reduceat(flat_column(rows, "labels")[0] != IGNORE_INDEX, begins, dtype=np.int64)
    num_bytes = np.add.reduceat(_looked_up(byte_lengths, ids), begins, dtype=np.int64)
    for name, mine in of_piece.items():
        account = ledger[name]
        account.trained = int(trained[mine].sum())
        account.masked = int(tokens[mine].sum()) - account.trained
        account.num_bytes = int(num_bytes[mine].sum())
    return ledger


def _looked_up(values: NDArray[np.int32], ids: NDArray[np.int32]) -> NDArray[np.int32]:
    """`values[ids]`; some thousand at a time, for which the wide index that numpy makes of the ids stays in the cache."""
    found = np.empty(len(ids), values.dtype)
    for at in range(0, len(ids), 1 << 16):
        found[at : at + (1 << 16)] = values.take(ids[at : at + (1 << 16)])  # an id beyond them is an error
    return found


def _accounts(ledger: Ledger, packed: Mapping[str, Ledger]) -> dict[str, dict[str, Any]]:
    """What was read, kept and left out, by source, and that it adds up."""
    accounts: dict[str, dict[str, Any]] = {}
    for name, account in ledger.accounts.items():
        splits = {split: _held(packed[split][name]) for split in SPLITS if name in packed[split].accounts}
        accounts[name] = {
            "documents_in": account.rows_in,
            "documents": account.rows_out,
            "tokens_in": account.tokens_in,
            "dropped_tokens": dict(account.dropped_tokens),
            "dropped_documents": dict(account.dropped_rows),
            "dropped_examples": account.dropped_examples,
            **splits,
        }
    return accounts


def _held(account: Account) -> dict[str, int]:
    return {
        "tokens": account.trained + account.masked,
        "supervised": account.trained,
        "num_bytes": account.num_bytes,
    }


def cut_dataset(source: str, path: str, dataset: Dataset, shard_bytes: int) -> list[Segment]:
    """Segments of a dataset, of about `shard_bytes` each."""
    per_row = max(1, dataset.data.nbytes // max(1, len(dataset.data)))
    rows = max(_ROWS_READ, shard_bytes // per_row)
    bounds = [*range(0, len(dataset), rows), len(dataset)]
    return [Segment(source, path, a, b, a, len(dataset), 0) for a, b in itertools.pairwise(bounds)]
