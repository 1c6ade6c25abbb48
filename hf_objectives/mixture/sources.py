"""Sources of a mixture: found, encoded where they are not yet, and held out of."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pyarrow as pa
from datasets import Dataset, IterableDataset, load_dataset

from hf_objectives.errors import ConfigError, DataError, HFObjectivesError, nearest
from hf_objectives.labels import BatchEncoder, EncodingConfig, Ledger, detect_format
from hf_objectives.mixture.config import MixtureConfig, SourceConfig
from hf_objectives.mixture.feeds import PreparedFeed, TableFeed
from hf_objectives.mixture.row_table import INTEGERS, RowList, RowTable
from hf_objectives.mixture.stream_feed import Feed, StreamFeed
from hf_objectives.packing import pack_dataset, pack_table
from hf_objectives.preparation import (
    MANIFEST,
    Manifest,
    OrderedStream,
    encode_rows,
    hold_out,
    is_hub_id,
    load_prepared,
    load_rows,
)
from hf_objectives.types import Row

logger = logging.getLogger(__name__)
_NO_TOKENIZER = "its rows have no input_ids, and there is no tokenizer to encode them; packing needs one"


@dataclass
class Opened:
    """A source that was opened: its feed, the type of each column, its evaluation rows, and notes for the user."""

    feed: Feed
    columns: dict[str, str]
    held_out: Dataset | None = None
    notes: list[str] = field(default_factory=list)


def open_source(source: SourceConfig, config: MixtureConfig, tokenizer: Any, seed: int) -> Opened:
    """Open a source, wherever it is and whatever its rows are; see `build_mixture`."""
    try:
        if isinstance(source.path, str) and (Path(source.path) / MANIFEST).is_file():
            return _open_prepared(source, config, tokenizer, seed)
        rows = _find_rows(source)
        if not hasattr(rows, "__iter__"):
            raise ConfigError(f"the dataset is {type(rows).__name__}; expected a dataset or rows")
        if isinstance(rows, OrderedStream):
            raise ConfigError("the dataset is a stream without an end; give the path of its folder")
        if isinstance(rows, (Dataset, Sequence)):
            return _open_mapped(source, rows, config, tokenizer, seed)
        return _open_stream(source, rows, config, tokenizer, seed)
    except DataError as error:
        raise error.at(source=source.name) from None
    except HFObjectivesError as error:
        if f"source {source.name!r}" in str(error):
            raise
        raise type(error)(f"source {source.name!r}: {error}") from error
    except OSError as error:  # the Hub does not answer, or does not have it
        raise ConfigError(f"source {source.name!r} cannot be read: {error}") from error


def _of_split(dataset: Mapping[str, Any], split: str) -> Any:
    if split not in dataset:
        raise ConfigError(f"the dataset has no split {split!r}; expected one of {', '.join(map(str, dataset))}")
    return dataset[split]


def _is_on_hub(source: SourceConfig) -> bool:
    return isinstance(source.path, str) and (is_hub_id(source.path) or source.data_files is not None)


def _find_rows(source: SourceConfig) -> Any:
    if isinstance(source.dataset, Mapping):  # a DatasetDict
        return _of_split(source.dataset, source.split)
    if source.dataset is not None:
        return source.dataset
    files = source.data_files if isinstance(source.data_files, str | None) else [*source.data_files]
    if _is_on_hub(source):
        return load_dataset(source.path, data_files=files, split=source.split, streaming=source.streaming)
    if source.streaming:
        raise ConfigError("streaming is for datasets of the Hub; prepare large files with hf-objectives prepare")
    named = source.path or files or ""
    found = [load_rows(name) for name in ([named] if isinstance(named, str) else named)]
    return found[0] if len(found) == 1 else [row for rows in found for row in rows]


# -- prepared folders ------------------------------------------------------------------------------------------------


def _open_prepared(source: SourceConfig, config: MixtureConfig, tokenizer: Any, seed: int) -> Opened:
    folder = Path(str(source.path))
    manifest = Manifest.read(folder)
    if config.packing == "across":
        raise ConfigError(
            f"{folder} holds packed rows, which are not packed across sources; expected packing 'within' or none"
        )
    if source.eval_share:
        raise ConfigError(f"{folder} holds out documents when it is prepared; expected eval_split='validation'")
    known = manifest.named
    name = known[0] if len(known) == 1 else source.name
    if known and name not in known:
        raise ConfigError(
            f"{folder} holds {', '.join(known)}; expected a source named like one of them{nearest(source.name, known)}"
        )
    expect = {"max_length": config.max_length} if config.max_length else {}
    own = crc32(f"{seed} {source.name}".encode())
    stream: Any = load_prepared(folder, tokenizer=tokenizer, expect=expect, sources=[name], streaming=True, seed=own)
    feed = PreparedFeed(
        source.name,
        stream,
        tokens=sum(shard.tokens for shard in manifest.shards if shard.split == "train" and shard.source == name),
        unit=config.unit,
        max_epochs=source.max_epochs,
        blocked=config.blocklist.get(source.name, ()),
    )
    names = ["input_ids", "position_ids", "seq_lengths", "sources", "rows"] + ["labels"] * bool(
        manifest.policy["labels"]
    )
    held_out: Any = load_prepared(folder, source.eval_split, sources=[name]) if source.eval_split else None
    return Opened(feed, dict.fromkeys(names, INTEGERS), held_out)


# -- mapped datasets and rows in memory ------------------------------------------------------------------------------


def _open_mapped(source: SourceConfig, rows: Any, config: MixtureConfig, tokenizer: Any, seed: int) -> Opened:
    if not len(rows):
        raise DataError("it holds no row; expected one at least", source=source.name)
    encoded = _holds_ids(source, rows[0])
    rows, ids, held_out, held_ids = _hold_out(source, rows, seed)
    notes: list[str] = []
    if tokenizer is not None and not encoded:
        rows, notes = _encode(source, rows, ids, config, tokenizer)
        if held_out is not None:
            held_out, _ = _encode(source, held_out, held_ids, config, tokenizer)
        encoded, ids = True, None
    if held_out is not None and not isinstance(held_out, Dataset):
        held_out = Dataset.from_list(list(held_out))
    if config.packing and not encoded:
        raise ConfigError(_NO_TOKENIZER)
    table: RowTable | RowList = RowTable(rows) if isinstance(rows, Dataset) else RowList(rows)
    table.check_columns(table.names, source.name)
    packed, across = "seq_lengths" in table.names, config.packing == "across"
    if across and packed:
        raise ConfigError("its rows are packed already; expected packing 'within', or documents")
    if config.packing == "within" and not packed:
        table, held_out = _pack(rows, ids, held_out, config)
        ids = None
    left_out = np.empty(0, np.int64)
    if across and config.overflow == "drop":
        left_out = np.flatnonzero(table.lengths("input_ids") > (config.max_length or 0))
    if len(left_out):
        found = f"{len(left_out):,} of {len(table):,} documents are longer than {config.max_length}"
        notes.append(f"source {source.name!r}: {found} and left out")
    feed = TableFeed(
        source.name,
        table,
        unit=config.unit,
        seed=seed,
        max_epochs=source.max_epochs,
        longest=config.max_length if across and config.overflow == "truncate" else None,
        blocked=config.blocklist.get(source.name, ()),
        left_out=left_out,
        ids=None if ids is None else np.array(ids),
    )
    return Opened(feed, table.types(), held_out, notes)


def _hold_out(source: SourceConfig, rows: Any, seed: int) -> tuple[Any, list[int] | None, Any, list[int] | None]:
    """The rows to train on, their numbers in the source (None for all), the held-out rows, and theirs."""
    if source.eval_split:
        if isinstance(source.dataset, Mapping):
            return rows, None, _of_split(source.dataset, source.eval_split), None
        if not _is_on_hub(source):
            raise ConfigError("eval_split is for datasets of the Hub and prepared folders; expected eval_share")
        return rows, None, load_rows(str(source.path), split=source.eval_split), None
    if not source.eval_share:
        return rows, None, None, None
    numbers = hold_out(rows, source.eval_share, seed=seed)
    keep, out = (rows.select(n) if isinstance(rows, Dataset) else [rows[i] for i in n] for n in numbers)
    return keep, numbers[0], out, numbers[1]


def _encode(
    source: SourceConfig, rows: Any, ids: Sequence[int] | None, config: MixtureConfig, tokenizer: Any
) -> tuple[Dataset, list[str]]:
    """Rows as token ids, and notes about what was dropped."""
    ledger = Ledger()
    numbered = rows if ids is None else [{**row, "row": number} for number, row in zip(ids, rows, strict=True)]
    options = config.encoding()
    table = encode_rows(numbered, tokenizer, options, source=source.name, num_proc=config.num_proc, ledger=ledger)
    named = table.column_names.index("source")
    table = table.set_column(named, "source", pa.array([source.name] * table.num_rows))  # whatever its rows say
    return Dataset(table), ledger.lines() if ledger.total().dropped_tokens else []


def _pack(
    rows: Any, ids: Sequence[int] | None, held_out: Dataset | None, config: MixtureConfig
) -> tuple[RowTable, Dataset | None]:
    """Pack the documents of a source into rows; they keep their numbers in the source."""
    whole = rows if isinstance(rows, Dataset) else Dataset.from_list([dict(row) for row in rows])
    if "row" not in whole.column_names:
        whole = whole.add_column("row", list(range(len(whole)) if ids is None else ids))
    held_out = None if held_out is None else pack_dataset(held_out, **config.packed_by)
    return RowTable(pack_dataset(whole, **config.packed_by)), held_out


# -- streams ---------------------------------------------------------------------------------------------------------


def _open_stream(source: SourceConfig, rows: Any, config: MixtureConfig, tokenizer: Any, seed: int) -> Opened:
    resumable = hasattr(rows, "state_dict") and hasattr(rows, "load_state_dict")
    place = rows.state_dict() if resumable and not isinstance(rows, IterableDataset) else None
    first = next(iter(rows), None)
    if place is not None:  # a look does not take the row
        rows.load_state_dict(place)
    if first is None:
        raise DataError("it holds no row; expected one at least", source=source.name)
    if source.eval_share or source.eval_split:
        raise ConfigError("it is a stream, of which nothing is held out; give its evaluation data as eval_dataset")
    across = config.packing == "across"
    if across and config.overflow == "drop":
        raise ConfigError("it is a stream, of which overflow='drop' would drop unseen; expected 'split' or 'truncate'")
    encoded = _holds_ids(source, first)
    encode = None
    columns = dict.fromkeys(first, "")  # types are known when it is read
    if (tokenizer is not None and not encoded) or config.packing == "within":
        if tokenizer is None and not encoded:
            raise ConfigError(_NO_TOKENIZER)
        pack = config.packed_by if config.packing == "within" else None
        encode = StreamEncoder(source.name, None if encoded else tokenizer, config.encoding(), pack)
        packed = ["seq_lengths", "position_ids"] if config.packing == "within" else []
        columns = dict.fromkeys(["input_ids", "labels", *packed], INTEGERS)
    feed = StreamFeed(
        source.name,
        rows,
        unit=config.unit,
        seed=seed,
        max_epochs=source.max_epochs,
        buffer_size=config.buffer_size,
        encode=encode,
        columns=None if encode else list(first),
        longest=config.max_length if across and config.overflow == "truncate" else None,
        blocked=config.blocklist.get(source.name, ()),
    )
    return Opened(feed, columns)


def _holds_ids(source: SourceConfig, row: Row) -> bool:
    """Whether rows hold token ids already; an error where they are not of the format that the configuration names."""
    if "seq_lengths" in row or source.format is None:
        return "input_ids" in row
    found = detect_format(row)
    if found != source.format:
        raise ConfigError(
            f"its rows are of format {found!r} (columns {', '.join(row)}), the configuration says {source.format!r}"
        )
    return found == "tokens"


@dataclass
class StreamEncoder:
    """Turns rows of a stream, as they are read, into encoded or packed ones; goes to loader workers.

    Without a tokenizer rows hold token ids. `pack` are the arguments of `pack_table`; None leaves rows as they are.
    """

    name: str
    tokenizer: Any
    options: EncodingConfig
    pack: Mapping[str, Any] | None

    @cached_property
    def _encoder(self) -> BatchEncoder:
        return BatchEncoder(self.tokenizer, self.options)

    def __call__(self, rows: Sequence[Row], first: int) -> pa.Table:
        """Encode rows, of which the first has this number."""
        numbers = range(first, first + len(rows))
        if self.tokenizer is None:
            columns = {name: [row[name] for row in rows] for name in ("input_ids", "labels") if name in rows[0]}
            lists = {name: pa.array(values, pa.list_(pa.int32())) for name, values in columns.items()}
            table = pa.table({**lists, "source": [self.name] * len(rows), "row": list(numbers)})
        else:
            table, ledger = self._encoder.encode(rows, source=self.name, numbers=numbers)
            if ledger.total().dropped_tokens:
                logger.info("; ".join(ledger.lines()))
        return pack_table(table, **self.pack, allow_empty=True) if self.pack and table.num_rows else table
