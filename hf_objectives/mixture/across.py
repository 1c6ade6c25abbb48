"""Packing across sources: drawn documents of all sources become rows together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_objectives.mixture.feeds import Units
from hf_objectives.mixture.row_table import Integers
from hf_objectives.packing import PackedRows, document_positions, pack_rows
from hf_objectives.types import IGNORE_INDEX

_CHOICES = 16  # packed rows of which the next is chosen


@dataclass(frozen=True)
class Packer:
    """Packs drawn documents into rows, see `pack_rows`."""

    max_length: int
    strategy: str
    overflow: str

    def pack(self, sources: Integers, units: Units, seed: int) -> PackedRows:
        """Pack documents, given the source of each, into rows in a random order that keeps to the shares."""
        offsets = np.concatenate(([0], np.cumsum(units.tokens)))
        packed = pack_rows(offsets, self.max_length, strategy=self.strategy, overflow=self.overflow)
        if self.strategy == "concat":  # its rows are in the order of the draws
            return packed
        return packed.in_order(_balanced_order(packed, sources, units, seed))


def _balanced_order(packed: PackedRows, sources: Integers, units: Units, seed: int) -> Integers:
    """A random order of packed rows in which every source stays close to its share of them.

    Of a few rows that are next at random, take the one after which the shares so far are closest to those of all rows. In
    the order in which they were filled, the first rows hold more of the sources with short documents, which fill gaps.
    """
    count = len(packed.row_offsets) - 1
    column = np.unique(sources, return_inverse=True)[1][packed.documents]
    row = np.repeat(np.arange(count), np.diff(packed.piece_offsets))
    amounts = np.zeros((count, int(column.max()) + 1))
    np.add.at(amounts, (row, column), packed.lengths * (units.amounts / units.tokens)[packed.documents])
    away = amounts - amounts.mean(axis=0)
    waiting = np.random.default_rng(seed).permutation(count).tolist()
    ahead = np.zeros(away.shape[1])  # of what each source should have had
    order = []
    while waiting:
        few = waiting[:_CHOICES]
        best = int(np.argmin(((ahead + away[few]) ** 2).sum(axis=1)))
        order.append(waiting.pop(best))
        ahead += away[order[-1]]
    return np.array(order, np.int64)


def packed_row(
    packed: PackedRows,
    begins: Integers,
    pieces: Integers,
    rows: Mapping[int, Mapping[str, Any]],
    numbers: Integers,
    sources: Sequence[str],
) -> dict[str, Any]:
    """One packed row, from the numbers of its pieces and their sources.

    Args:
        begins: int64 [pieces of all rows], where each piece begins in its document.
        rows: documents, by their numbers among the units.
        numbers: int64 [documents], the number of each in its source.
    """
    documents, lengths = packed.documents[pieces].tolist(), packed.lengths[pieces]
    ids, labels = [], []
    for document, begin, length in zip(documents, begins[pieces].tolist(), lengths.tolist(), strict=True):
        row, piece = rows[document], slice(begin, begin + length)
        ids.append(np.asarray(row["input_ids"][piece], np.int32))
        labels.append(ids[-1] if row.get("labels") is None else row["labels"][piece])
    trained = np.concatenate(labels).astype(np.int32)
    trained[np.cumsum(lengths) - lengths] = IGNORE_INDEX
    return {
        "input_ids": np.concatenate(ids),
        "labels": trained,
        "position_ids": document_positions(lengths),
        "seq_lengths": lengths.astype(np.int32),
        "sources": list(sources),
        "rows": [rows[d].get("row", n) for d, n in zip(documents, numbers[documents].tolist(), strict=True)],
    }
