"""Pack a whole encoded dataset, over its Arrow columns."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset
from datasets.fingerprint import Hasher
from numpy.typing import NDArray

from hf_objectives.errors import FormatError, NothingSupervisedError
from hf_objectives.packing.rows import PackedRows, document_positions, pack_rows
from hf_objectives.types import IGNORE_INDEX

logger = logging.getLogger(__name__)


def pack_dataset(
    dataset: Dataset, max_length: int, *, strategy: str = "best_fit", overflow: str = "truncate"
) -> Dataset:
    """Pack the documents of an encoded dataset into rows of at most `max_length` tokens.

    Args:
        dataset: columns `input_ids` and, unless every token is trained, `labels`; `source` and `row` are kept.
        max_length: most tokens a row may hold.
        strategy, overflow: see `pack_rows`.

    Returns:
        A dataset with `input_ids` and `labels` (list of int32; the first label of each document is -100), `seq_lengths`
        (the lengths of the documents in a row, in order) and `position_ids` (of each token in its document): a plain Trainer
        keeps the latter, SFTTrainer the former. Where the dataset has `source` or `row`, also `sources` and `rows`, one
        entry per document. Every row trains at least one token; the log counts rows that would not, which
        are left out.

    Raises:
        FormatError: no column `input_ids`, or labels of another length.
        NothingSupervisedError: no row would train a token.
        ConfigError: an unknown strategy or overflow, or `max_length` under 2.
    """
    if "input_ids" not in dataset.column_names:
        raise FormatError(f"columns {', '.join(dataset.column_names)}; expected input_ids, encode the dataset first")
    table = pack_table(dataset.with_format("arrow")[:], max_length, strategy=strategy, overflow=overflow)
    # A fingerprint from what the rows follow from; datasets would hash the whole table.
    return Dataset(table, fingerprint=Hasher.hash([dataset._fingerprint, "pack", max_length, strategy, overflow]))


def pack_table(
    table: pa.Table,
    max_length: int,
    *,
    strategy: str = "best_fit",
    overflow: str = "truncate",
    labels: bool = True,
    allow_empty: bool = False,
) -> pa.Table:
    """`pack_dataset` for Arrow tables.

    Args:
        labels: False leaves the column `labels` out, for tables of which all tokens but the first of a document are trained.
        allow_empty: a result without a row is no error.
    """
    how: Any = {"strategy": strategy, "overflow": overflow, "labels": labels, "allow_empty": allow_empty}
    return pa.concat_tables(pack_tables(table, max_length, None, **how))


def pack_tables(
    table: pa.Table,
    max_length: int,
    rows_at_once: int | None,
    *,
    strategy: str = "best_fit",
    overflow: str = "truncate",
    labels: bool = True,
    allow_empty: bool = False,
) -> Iterator[pa.Table]:
    """`pack_table`, some rows at a time: so that no more of a table on disk is in memory. None yields all at once."""
    ids, offsets = flat_column(table, "input_ids")
    targets, label_offsets = flat_column(table, "labels") if "labels" in table.column_names else (ids, offsets)
    if not np.array_equal(offsets, label_offsets):
        row = int(np.flatnonzero(offsets != label_offsets)[0]) - 1
        raise FormatError("labels and input_ids have different lengths; expected one label per token", row=row)
    rows = pack_rows(offsets, max_length, strategy=strategy, overflow=overflow)
    count, kept = len(rows.row_offsets) - 1, 0
    more = {f"{name}s": table[name].combine_chunks() for name in ("source", "row") if name in table.column_names}
    step = rows_at_once or max(1, count)
    for begin in range(0, max(1, count), step):
        part = rows if step >= count else rows.in_order(np.arange(begin, min(count, begin + step)))
        packed_ids, *others = part.gather_all([ids, targets] if labels else [ids])
        columns: dict[str, Any] = {"input_ids": list_column(packed_ids, part.row_offsets)}
        if others:
            columns["labels"] = list_column(part.without_begins(others[0]), part.row_offsets)
        columns["position_ids"] = list_column(document_positions(part.lengths), part.row_offsets)
        columns["seq_lengths"] = list_column(part.lengths.astype(np.int32), part.piece_offsets)
        for name, column in more.items():
            of_pieces = column.take(pa.array(part.documents))
            columns[name] = pa.ListArray.from_arrays(pa.array(part.piece_offsets, pa.int32()), of_pieces)
        packed = pa.table(columns)
        keep = _trains(part, others[0] if others else None)
        kept += int(keep.sum())
        yield packed if keep.all() else packed.filter(pa.array(keep))
    if not kept and not allow_empty:
        raise NothingSupervisedError(
            f"none of {count} packed rows trains a token; check labels and max_length={max_length}"
        )
    tokens, lost = int(rows.row_offsets[-1]), int(rows.dropped.sum())
    logger.log(
        logging.DEBUG if allow_empty else logging.INFO,  # blocks of a corpus go into its manifest
        "packed %d documents into %d rows, %.1f%% full; %d tokens dropped; %d rows without a trained token left out",
        *(len(rows.dropped), kept, 100 * tokens / max(1, count * max_length), lost, count - kept),
    )


def _trains(rows: PackedRows, labels: NDArray[np.int32] | None) -> NDArray[np.bool_]:
    """Which rows train a token, bool [rows]; without labels, those in which a piece has more than its first token."""
    if labels is None:
        return np.diff(np.concatenate(([0], np.cumsum(rows.lengths > 1)))[rows.piece_offsets]) > 0
    sizes = np.diff(rows.row_offsets)
    trains = sizes > 0
    # Nearly always a row's last token is trained; only where it is not are all labels of the row read.
    trains[trains] = labels[rows.row_offsets[1:][trains] - 1] != IGNORE_INDEX
    for i in np.flatnonzero(~trains & (sizes > 0)):
        trains[i] = (labels[rows.row_offsets[i] : rows.row_offsets[i + 1]] != IGNORE_INDEX).any()
    return trains


def flat_column(table: pa.Table, name: str) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """A list column as its values end to end, int32 [total], and the offsets of its rows, int64 [rows + 1].

    Raises:
        FormatError: the column holds no lists.
    """
    chunks = table[name]
    column = chunks.chunk(0) if chunks.num_chunks == 1 else chunks.combine_chunks()  # which copies a single one, too
    if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
        raise FormatError(f"column {name!r} is {column.type}; expected lists of token ids")
    offsets = column.offsets.to_numpy().astype(np.int64)
    values = column.flatten().to_numpy(zero_copy_only=False).astype(np.int32, copy=False)
    return values, offsets - offsets[0]


def list_column(values: NDArray[np.int32], offsets: NDArray[np.int64]) -> pa.Array:
    """Lists from their values end to end, int32 [total], and the offsets of the rows, int64 [rows + 1]; nothing is copied."""
    # datasets writes and reads 32-bit lists; a table past 2^31 tokens keeps the long ones.
    kind = pa.ListArray if offsets[-1] < 2**31 else pa.LargeListArray
    width = pa.int32() if kind is pa.ListArray else pa.int64()
    return kind.from_arrays(pa.array(offsets, width), pa.array(values, pa.int32()))
