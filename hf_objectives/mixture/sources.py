"""Sources of a mixture: found, encoded where they are not yet, and held out of."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pyarrow as pa
from datasets import Dataset, IterableDataset, load_dataset

from hf_objectives.errors import ConfigError, DataError, HFObjectivesError, nearest
from hf_objectives.labels import BatchEncoder, Ledger, detect_format
from hf_objectives.mixture.config import MixtureConfig, SourceConfig
from hf_objectives.mixture.feeds import Feed
from hf_objectives.mixture.prepared_feed import PreparedFeed
from hf_objectives.mixture.row_table import INTEGERS, RowList, RowTable
from hf_objectives.mixture.streams import StreamFeed
from hf_objectives.mixture.table_feed import TableFeed
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


@dataclass
class Opened:
    """A source, its columns with their types, what is held out of it, and what there is to say."""

    feed: Feed
    columns: dict[str, str]
    held_out: Dataset | None = None
    notes: list[str] = field(default_factory=list)


def open_source(source: SourceConfig, config: MixtureConfig, tokenizer: Any, seed: int) -> Opened:
    """A source, wherever it is and whatever its rows are; see `build_mixture`."""
    try:
        if isinstance(source.path, str) and (Path(source.path) / MANIFEST).is_file():
            return _open_prepared(source, config, tokenizer, seed)
        rows = _rows(source)
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


def _rows(source: SourceConfig) -> Any:
    """The rows of a source, wherever they are."""
    if source.dataset is not None:
        if isinstance(source.dataset, Mapping):  # a DatasetDict
            known = ", ".join(map(str, source.dataset))
            if source.split not in source.dataset:
                raise ConfigError(f"the dataset has no split {source.split!r}; expected one of {known}")
            return source.dataset[source.split]
        return source.dataset
    if isinstance(source.path, str) and (is_hub_id(source.path) or source.data_files is not None):
        files = (
            source.data_files
            if source.data_files is None or isinstance(source.data_files, str)
            else list(source.data_files)
        )
        return load_dataset(source.path, data_files=files, split=source.split, streaming=source.streaming)
    if source.streaming:
        raise ConfigError("streaming is for datasets of the Hub; prepare large files with hf-objectives prepare")
    where = source.path or source.data_files or ""
    found = [load_rows(one) for one in ([where] if isinstance(where, str) else where)]
    return found[0] if len(found) == 1 else [row for rows in found for row in rows]


def _open_prepared(source: SourceConfig, config: MixtureConfig, tokenizer: Any, seed: int) -> Opened:
    folder = Path(str(source.path))
    manifest = Manifest.read(folder)
    if config.packing == "across":
        raise ConfigError(
            f"{folder} holds packed rows, which are not packed across sources; expected packing 'within' or none"
        )
    if source.eval_share:
        raise ConfigError(f"{folder} holds out documents when it is prepared; expected eval_split='validation'")
    held = list(manifest.sources)
    if source.name not in held and len(held) > 1:
        raise ConfigError(
            f"{folder} holds {', '.join(held)}; expected a source named like one of them{nearest(source.name, held)}"
        )
    name = source.name if source.name in held else held[0]
    expect = {"max_length": config.max_length} if config.max_length else {}
    own = crc32(f"{seed} {source.name}".encode())
    stream: Any = load_prepared(folder, tokenizer=tokenizer, expect=expect, sources=[name], streaming=True, seed=own)
    feed = PreparedFeed(
        source.name,
        stream,
        tokens=sum(shard.tokens for shard in manifest.shards if shard.split == "train" and shard.source == name),
        unit=config.unit,
        seed=seed,
        max_epochs=source.max_epochs,
        blocked=config.blocklist.get(source.name, ()),
    )
    columns = dict.fromkeys(["input_ids", "seq_lengths", "sources", "rows"], INTEGERS)
    if manifest.policy["labels"]:
        columns["labels"] = INTEGERS
    held_out: Any = load_prepared(folder, source.eval_split, sources=[name]) if source.eval_split else None
    return Opened(feed, columns, held_out)


def _open_mapped(
    source: SourceConfig, rows: Dataset | Sequence[Row], config: MixtureConfig, tokenizer: Any, seed: int
) -> Opened:
    if not len(rows):
        raise DataError("it holds no row; expected one at least", source=source.name)
    encoded = _check_format(source, rows[0])
    held_out, out, ids = _eval_rows(source, rows, seed)
    if ids is not None:
        rows = rows.select(ids) if isinstance(rows, Dataset) else [rows[i] for i in ids]
    notes: list[str] = []
    if tokenizer is not None and not encoded:
        rows, notes = _encoded(source, rows, ids, config, tokenizer)
        if held_out is not None:
            held_out, _ = _encoded(source, held_out, out, config, tokenizer)
        encoded, ids = True, None
    if held_out is not None and not isinstance(held_out, Dataset):
        held_out = Dataset.from_list(list(held_out))
    if config.packing and not encoded:
        raise ConfigError("its rows have no input_ids, and there is no tokenizer to encode them; packing needs one")
    table: RowTable | RowList = RowTable(rows) if isinstance(rows, Dataset) else RowList(rows)
    if (odd := table.odd(table.names)) is not None:
        raise DataError(
            f"columns {', '.join(odd[1])}; expected {', '.join(table.names)}, as in the first row", row=odd[0]
        )
    packed = "seq_lengths" in table.names
    if config.packing == "within" and not packed:
        whole = rows if isinstance(rows, Dataset) else Dataset.from_list([dict(row) for row in rows])
        if "row" not in whole.column_names:
            whole = whole.add_column("row", list(range(len(whole)) if ids is None else ids))
        pack = partial(
            pack_dataset, max_length=config.max_length or 0, strategy=config.strategy, overflow=config.overflow
        )
        table, ids = RowTable(pack(whole)), None
        if held_out is not None:
            held_out = pack(held_out)
    if config.packing == "across" and packed:
        raise ConfigError("its rows are packed already; expected packing 'within', or documents")
    across = config.packing == "across"
    left_out = None
    if across and config.overflow == "drop":
        left_out = np.flatnonzero(table.lengths("input_ids") > (config.max_length or 0))
        if len(left_out):
            notes.append(
                f"source {source.name!r}: {len(left_out):,} of {len(table):,} documents are longer than "
                f"{config.max_length} and left out"
            )
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


def _eval_rows(source: SourceConfig, rows: Any, seed: int) -> tuple[Any, list[int] | None, list[int] | None]:
    """What is held out of a source, the numbers of those rows, and of the rows that are left; None for all."""
    if source.eval_split:
        if isinstance(source.dataset, Mapping):
            if source.eval_split not in source.dataset:
                raise ConfigError(
                    f"the dataset has no split {source.eval_split!r}; expected one of {', '.join(source.dataset)}"
                )
            return source.dataset[source.eval_split], None, None
        if not isinstance(source.path, str) or not (is_hub_id(source.path) or source.data_files is not None):
            raise ConfigError("eval_split is for datasets of the Hub and prepared folders; expected eval_share")
        return load_rows(source.path, split=source.eval_split), None, None
    if not source.eval_share:
        return None, None, None
    keep, out = hold_out(rows, source.eval_share, seed=seed)
    return (rows.select(out) if isinstance(rows, Dataset) else [rows[i] for i in out]), out, keep


def _encoded(
    source: SourceConfig, rows: Any, ids: Sequence[int] | None, config: MixtureConfig, tokenizer: Any
) -> tuple[Dataset, list[str]]:
    """Rows as token ids, and what was dropped of them."""
    ledger = Ledger()
    given = [{**row, "row": number} for number, row in zip(ids, rows, strict=True)] if ids is not None else rows
    settings = config.row_settings()
    table = encode_rows(given, tokenizer, settings, source=source.name, num_proc=config.num_proc, ledger=ledger)
    named = table.column_names.index("source")
    table = table.set_column(named, "source", pa.array([source.name] * table.num_rows))  # whatever its rows say
    notes = [line for line in ledger.lines() if ledger.total().dropped_tokens]
    return Dataset(table), notes


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
    if config.packing == "across" and config.overflow == "drop":
        raise ConfigError("it is a stream, of which overflow='drop' would drop unseen; expected 'split' or 'truncate'")
    encoded = _check_format(source, first)
    encode = None
    columns = dict.fromkeys(first, "")  # types are known when it is read
    if (tokenizer is not None and not encoded) or config.packing == "within":
        if tokenizer is None and not encoded:
            raise ConfigError("its rows have no input_ids, and there is no tokenizer to encode them; packing needs one")
        encode = StreamEncoder(source.name, config, None if encoded else tokenizer)
        columns = dict.fromkeys(["input_ids", "labels"] + ["seq_lengths"] * (config.packing == "within"), INTEGERS)
    feed = StreamFeed(
        source.name,
        rows,
        unit=config.unit,
        seed=seed,
        max_epochs=source.max_epochs,
        buffer_size=config.buffer_size,
        encode=encode,
        columns=None if encode else list(first),
        longest=config.max_length if config.packing == "across" and config.overflow == "truncate" else None,
        blocked=config.blocklist.get(source.name, ()),
    )
    return Opened(feed, columns)


def _check_format(source: SourceConfig, row: Row) -> bool:
    """Whether rows hold token ids already.

    Raises:
        ConfigError: they are not what the configuration says.
    """
    if "seq_lengths" in row or source.format is None:
        return "input_ids" in row
    found = detect_format(row)
    if found != source.format:
        raise ConfigError(
            f"its rows are of format {found!r} (columns {', '.join(row)}), the configuration says {source.format!r}"
        )
    return found == "tokens"


class StreamEncoder:
    """Rows of a stream as they are read to encoded, or packed, ones; goes to loader workers.

    Args:
        name: the source.
        config: the mixture's.
        tokenizer: encodes them; None for rows that hold token ids.
    """

    def __init__(self, name: str, config: MixtureConfig, tokenizer: Any) -> None:
        self._name, self._tokenizer = name, tokenizer
        self._settings = config.row_settings()
        self._pack = (config.max_length, config.strategy, config.overflow) if config.packing == "within" else None

    @cached_property
    def _encoder(self) -> BatchEncoder:
        return BatchEncoder(self._tokenizer, self._settings)

    def __call__(self, rows: Sequence[Row], first: int) -> pa.Table:
        """Encode rows, of which the first has this number."""
        numbers = range(first, first + len(rows))
        if self._tokenizer is None:
            columns = {name: [row[name] for row in rows] for name in ("input_ids", "labels") if name in rows[0]}
            lists = {name: pa.array(values, pa.list_(pa.int32())) for name, values in columns.items()}
            table = pa.table({**lists, "source": [self._name] * len(rows), "row": list(numbers)})
        else:
            table, ledger = self._encoder.encode(rows, source=self._name, numbers=numbers)
            if ledger.total().dropped_tokens:
                logger.info("; ".join(ledger.lines()))
        if self._pack is None or not table.num_rows:
            return table
        max_length, strategy, overflow = self._pack
        return pack_table(table, max_length or 0, strategy=strategy, overflow=overflow, allow_empty=True)
