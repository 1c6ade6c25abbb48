"""Choose the rows that an inspection shows, and say what became of each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hf_objectives.inspection.token_texts import TokenTexts
from hf_objectives.inspection.types import InspectedRow, LabelWarning, PackedRow, Place, WholeRow
from hf_objectives.labels import EncodingConfig, Labelled
from hf_objectives.packing import pack_table

_LONG_ROW = 8_000  # tokens; of a longer row the beginning is shown, unless it is trained whole
_Piece = tuple[NDArray[np.int32], NDArray[np.int32]]


def pieces_by_position(labelled: Labelled, positions: Sequence[int]) -> dict[int, list[_Piece]]:
    """Ids and labels (int32 [tokens]) of the pieces of each row, by the row's position."""
    pieces: defaultdict[int, list[_Piece]] = defaultdict(list)
    for i, position in enumerate(positions):
        part = slice(labelled.offsets[i], labelled.offsets[i + 1])
        pieces[position].append((labelled.ids[part], labelled.labels[part]))
    return dict(pieces)


def examples_to_show(
    whole: Sequence[WholeRow],
    warnings: Sequence[LabelWarning],
    labelled: Labelled,
    positions: Sequence[int],
    settings: EncodingConfig,
    texts: TokenTexts,
    show: int,
    show_tokens: int,
) -> list[InspectedRow]:
    """Rows to show with their tokens; `labelled` holds the pieces that the policies keep, at `positions`."""
    kept = pieces_by_position(labelled, positions)
    kinds: defaultdict[int, list[str]] = defaultdict(list)
    for warning in warnings:
        for position in warning.positions:
            kinds[position].append(warning.kind)
    most = max(_LONG_ROW, min(settings.max_length or 0, show_tokens // 10))
    shown = []
    for row in _chosen(whole, warnings, show, show_tokens, most):
        pieces = kept.get(row.position, [])
        fates = _fates(row, [len(ids) for ids, _ in pieces], settings)
        for (ids, labels), fate in zip(pieces or [(row.ids, row.labels)], fates, strict=True):
            tokens, more = texts.tokens(ids[:most], labels[:most]), max(0, len(ids) - most)
            flags = tuple(kinds[row.position])
            shown.append(InspectedRow(row.source, row.number, fate, ids, labels, tokens, more, flags))
    return shown


def _chosen(
    whole: Sequence[WholeRow], warnings: Sequence[LabelWarning], show: int, show_tokens: int, most: int
) -> list[WholeRow]:
    """One row of each source, one of each warning (of duplicates two), then the first, while there is room."""
    by_position = {row.position: row for row in whole}
    first_of_source = {row.source: row.position for row in reversed(whole)}
    flagged = [
        position for warning in warnings for position in warning.positions[: 2 if warning.kind == "duplicates" else 1]
    ]
    picked: list[WholeRow] = []
    tokens = 0
    for position in dict.fromkeys([*sorted(first_of_source.values()), *flagged, *by_position]):
        row = by_position.get(position)
        if len(picked) == show:
            break
        size = sum(min(size, most) for size in row.sizes) if row is not None else 0
        if row is not None and (not picked or tokens + size <= show_tokens):
            picked.append(row)
            tokens += size
    return sorted(picked, key=lambda row: row.position)


def _fates(row: WholeRow, kept: Sequence[int], settings: EncodingConfig) -> list[str]:
    """What became of each piece of a row, `kept` being their tokens; of the row where no piece is kept."""
    limit, size, made = settings.max_length, len(row.ids), len(row.sizes)
    if not kept:
        if row.trains_nothing:
            return ["left out: no trained token"]
        if settings.overlength == "cut":
            return ["left out: no trained token before the cut at max_length"]
        if made > 1:
            return [f"left out: {made} parts, all longer than max_length {limit:,}"]
        return [f"left out: {size:,} tokens, longer than max_length {limit:,}"]
    if len(kept) > 1 or made > 1:
        lost = f", {made - len(kept)} others left out" if made > len(kept) else ""
        return [f"part {k + 1} of {len(kept)}{lost}" for k in range(len(kept))]
    if kept[0] < size:
        return [f"cut from {size:,} to {kept[0]:,} tokens"]
    return ["split over packed rows" if limit is not None and kept[0] > limit else ""]


def packed_to_show(
    labelled: Labelled,
    places: Sequence[Place],
    max_length: int,
    strategy: str,
    texts: TokenTexts,
    show: int,
    show_tokens: int,
) -> tuple[list[PackedRow], int, float]:
    """Pack documents. Return rows to show, the number of packed rows, and the share of their room that is used."""
    if not len(places):
        return [], 0, 0.0
    sources, numbers = zip(*places, strict=True)
    table = labelled.to_table().append_column("source", [sources]).append_column("row", [numbers])
    packed = pack_table(table, max_length, strategy=strategy, overflow="split", allow_empty=True)
    lengths = packed["seq_lengths"].combine_chunks().flatten().to_numpy()
    shown: list[PackedRow] = []
    tokens = 0
    for row in packed.slice(0, show).to_pylist():
        tokens += len(row["input_ids"])
        if shown and tokens > show_tokens:
            break
        documents: PackedRow = []
        begin = 0
        for source, number, length in zip(row["sources"], row["rows"], row["seq_lengths"], strict=True):
            ids, labels = (row[key][begin : begin + length] for key in ("input_ids", "labels"))
            documents.append((source, number, texts.tokens(ids, labels)))
            begin += length
        shown.append(documents)
    return shown, packed.num_rows, float(lengths.sum() / max(1, packed.num_rows * max_length))
