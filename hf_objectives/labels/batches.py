"""Encode batches of rows to Arrow tables: plain texts all in arrays, every other format row by row."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hf_objectives.errors import FormatError
from hf_objectives.labels.config import ON_ERROR, EncodingConfig
from hf_objectives.labels.formats import NOT_TEXT
from hf_objectives.labels.framing import frame_documents
from hf_objectives.labels.ledger import Ledger, account_rows
from hf_objectives.labels.rows import RowEncoder
from hf_objectives.labels.templates import control_tokens
from hf_objectives.labels.tokenization import text_encoder
from hf_objectives.types import Row, check_one_of

_TEXT = operator.itemgetter("text")


class BatchEncoder:
    """Encodes batches of rows.

    Args:
        tokenizer: a fast transformers tokenizer.
        config: how rows become ids and labels.
        on_error: what happens to a row that cannot be used: "raise" an error that names it, or "skip" and count it.

    Raises:
        ConfigError: unknown `on_error`.
    """

    def __init__(self, tokenizer: Any, config: EncodingConfig, *, on_error: str = "raise") -> None:
        check_one_of("on_error", on_error, ON_ERROR)
        self.tokenizer, self.config, self.on_error = tokenizer, config, on_error
        self._rows = RowEncoder(tokenizer, config)
        self._control: NDArray[np.int32] | None = None

    def encode(self, rows: Sequence[Row], *, source: str, numbers: Sequence[int]) -> tuple[pa.Table, Ledger]:
        """Encode rows, and leave out those that are too long or train nothing.

        Args:
            rows: the rows, of one format per source.
            source: source of rows that name none in `source`.
            numbers: number of each row that has none of its own in `row`.

        Returns:
            A table with `input_ids`, `labels` (list of int32), `source` and `row`; and the ledger of the batch. There is no
            column `labels` where every token is trained but the one that stands before a text.

        Raises:
            DataError: a row that cannot be used; names source and row.
        """
        ledger = Ledger()
        columns = self._text_columns(rows)
        if columns is not None and (table := self._texts(rows, columns, source, numbers, ledger)) is not None:
            return table, ledger
        labelled, sources, kept = self._rows.encode(
            rows, source=source, numbers=numbers, ledger=ledger, skip=self.on_error == "skip"
        )
        table = labelled.to_table().append_column("source", pa.array(sources, pa.string()))
        return table.append_column("row", pa.array(kept, pa.int64())), ledger

    def _text_columns(self, rows: Sequence[Row]) -> set[str] | None:
        """The columns of rows that are all plain texts of any length; None where one of them is not."""
        if not self.config.splits_documents or set(map(type, rows)) != {dict}:
            return None
        shapes = set(map(tuple, rows))
        if not all("text" in shape and NOT_TEXT.isdisjoint(shape) for shape in shapes):
            return None
        return set().union(*shapes) if set(map(type, map(_TEXT, rows))) == {str} else None

    def _texts(
        self, rows: Sequence[Row], columns: set[str], source: str, numbers: Sequence[int], ledger: Ledger
    ) -> pa.Table | None:
        """Plain texts tokenised, framed and accounted for in arrays; None where one needs the care of `RowEncoder`."""
        texts = list(map(_TEXT, rows))
        try:
            ids, offsets = text_encoder(self.tokenizer).encode_ids(texts)
        except FormatError:  # a character without a token: RowEncoder names the row
            return None
        if self.config.control_tokens == "plain" and self._holds_control(ids):
            return None
        frame = self._rows.document_frame
        if len(frame.before) > 1:  # without a column `labels`, only a first token is untrained
            return None
        said = ~np.fromiter(map(str.isspace, texts), bool, len(texts)) & (np.diff(offsets) > 0)
        framed = frame_documents(ids, offsets, frame, said)
        ids, sizes = framed.ids, np.diff(framed.offsets)
        sources = [source] * len(rows)
        if "source" in columns:
            sources = [str(row.get("source") or source) for row in rows]
        if "row" in columns:
            numbers = [row["row"] if type(row.get("row")) is int else n for row, n in zip(rows, numbers, strict=True)]
        for name, count in Counter(sources).items():
            ledger[name].rows_in += count
        trained = (sizes - len(frame.before)) * said
        kept = account_rows(ledger, sources, numbers, sizes, sizes, trained, np.ones(len(rows), bool))
        if len(kept) < len(rows):
            ids = ids[np.repeat(said, sizes)]
        offsets = np.concatenate(([0], np.cumsum(sizes[kept])))
        return pa.table(
            {
                "input_ids": pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(ids)).cast(pa.list_(pa.int32())),
                "source": pa.array(sources, pa.string()).take(pa.array(kept)),
                "row": pa.array(np.asarray(numbers, np.int64)[kept]),
            }
        )

    def _holds_control(self, ids: NDArray[np.int32]) -> bool:
        """Whether a text holds an id that no text may turn into: that of a control token."""
        if self._control is None:
            added = self.tokenizer.added_tokens_encoder
            known = [added[token] for token in control_tokens(self.tokenizer, "") if token in added]
            self._control = np.array(sorted(known), np.int32)
        if not len(self._control):
            return False
        # Control ids mostly lie side by side, so that two comparisons tell.
        near = (ids >= self._control[0]) & (ids <= self._control[-1])
        return bool(near.any()) and bool(np.isin(ids[near], self._control).any())
