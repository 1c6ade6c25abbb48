"""Encoded texts with labels: which tokens lie in the trained spans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hf_objectives.labels.messages import CLOSE, OPEN
from hf_objectives.labels.spans import Rendered
from hf_objectives.labels.tokenization import Encoded
from hf_objectives.types import IGNORE_INDEX


@dataclass(frozen=True, slots=True)
class Labelled:
    """A batch of encoded texts with labels.

    Attributes:
        ids: int32 [total], token ids of all rows end to end.
        labels: int32 [total], the id where a token is trained, -100 elsewhere; unshifted.
        offsets: int64 [rows + 1], row i is `[offsets[i]:offsets[i + 1]]`.
        spans: int64 [spans, 2], the trained runs as half-open ranges of positions in `ids`.
        span_rows: int64 [spans], the row of each run.
    """

    ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    offsets: NDArray[np.int64]
    spans: NDArray[np.int64]
    span_rows: NDArray[np.int64]

    def row(self, i: int) -> dict[str, list[int]]:
        """Row i as lists."""
        a, b = self.offsets[i], self.offsets[i + 1]
        return {"input_ids": self.ids[a:b].tolist(), "labels": self.labels[a:b].tolist()}

    def to_table(self) -> pa.Table:
        """All rows as a table of two list columns."""
        offsets = pa.array(self.offsets, pa.int64())
        return pa.table(
            {
                name: pa.LargeListArray.from_arrays(offsets, values).cast(pa.list_(pa.int32()))
                for name, values in (("input_ids", self.ids), ("labels", self.labels))
            }
        )


def label_spans(encoded: Encoded, rendered: Sequence[Rendered]) -> Labelled:
    """Labels of encoded texts: a token is trained when it lies in a span.

    A token that begins before a span is not trained: the prompt supplies its beginning. One that ends after it is
    trained only where what follows the span is white space that the token swallows (`<|end|>` with `rstrip`).
    """
    # One axis for all texts: text i begins at base[i], further on than any place in text i - 1.
    base = [0]
    bounds: list[tuple[int, int, int]] = []
    rows: list[int] = []
    for i, row in enumerate(rendered):
        text, shift, ascii_only = row.text, base[-1], row.text.isascii()
        for span in row.spans:
            begin, end = span
            stretched = end
            while stretched < len(text) and text[stretched].isspace():
                stretched += 1
            if not ascii_only:
                begin, end, stretched = (_place(text, at, encoded.in_bytes[i]) for at in (begin, end, stretched))
            bounds.append((begin + shift, end + shift, stretched + shift))
            rows.append(i)
        base.append(shift + 4 * len(text) + 1)
    shifts = np.repeat(np.array(base[:-1], np.int64), np.diff(encoded.offsets))
    starts, ends = encoded.starts + shifts, encoded.ends + shifts
    places = np.asarray(bounds, dtype=np.int64).reshape(-1, 3)
    first = np.searchsorted(starts, places[:, 0], "left")
    last = np.minimum(np.searchsorted(ends, places[:, 2], "right"), np.searchsorted(starts, places[:, 1], "left"))
    last = np.maximum(first, last)
    steps = np.zeros(len(encoded.ids) + 1, np.int64)
    np.add.at(steps, first, 1)
    np.add.at(steps, last, -1)
    labels = np.where(np.cumsum(steps[:-1]) > 0, encoded.ids, IGNORE_INDEX).astype(np.int32)
    spans = np.stack([first, last], axis=1)
    return Labelled(encoded.ids, labels, encoded.offsets, spans, np.asarray(rows, np.int64))


def _place(text: str, at: int, in_bytes: bool) -> int:
    """Character position `at` of a text in the unit of its tokens' places."""
    head = text[:at]
    if in_bytes:
        return at if head.isascii() else len(head.encode())
    return at - head.count(OPEN) - head.count(CLOSE)


def cut(rows: Labelled, max_length: int | NDArray[np.int64]) -> Labelled:
    """Rows cut to `max_length` tokens, all or each; a trained run that the cut goes through is not trained at all."""
    sizes = np.diff(rows.offsets)
    if not (sizes > max_length).any():
        return rows
    limits = rows.offsets[:-1] + np.minimum(sizes, max_length)
    labels = rows.labels.copy()
    for (begin, end), row in zip(rows.spans, rows.span_rows, strict=True):
        if end > limits[row]:
            labels[begin:end] = IGNORE_INDEX
    keep = np.arange(len(rows.ids)) < np.repeat(limits, sizes)
    offsets = np.concatenate(([0], np.cumsum(np.minimum(sizes, max_length))))
    # The runs are given up with the positions that they spoke of: a cut table is a result, not to be cut again.
    none = np.empty((0, 2), np.int64)
    return Labelled(rows.ids[keep], labels[keep], offsets, none, np.empty(0, np.int64))
