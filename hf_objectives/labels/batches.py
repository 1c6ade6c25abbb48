"""Batches of rows to a table of encoded documents: plain texts all in arrays, every other format row by row."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hf_objectives.errors import ConfigError, FormatError, nearest
from hf_objectives.labels.config import ON_ERROR
from hf_objectives.labels.framing import make_room
from hf_objectives.labels.ledger import Ledger
from hf_objectives.labels.rows import UNSUPERVISED, EncodingConfig, RowEncoder
from hf_objectives.labels.templates import control_tokens
from hf_objectives.labels.tokenization import text_encoder
from hf_objectives.types import Row

_TEXT = operator.itemgetter("text")
# Columns that make a row something other than a plain text, when `text` is there too.
_FORMAT_COLUMNS = frozenset(
    "input_ids messages conversations instruction output prompt completion chosen rejected image images pixel_values "
    "video videos audio audios".split()
)


class BatchEncoder:
    """Encodes batches of rows; see `prepare_dataset` for the settings.

    Args:
        tokenizer: a fast transformers tokenizer.
        settings: the policies.
        on_error: what becomes of a row that cannot be used: "raise" an error that names it, or "skip" and book it.

    Raises:
        ConfigError: unknown `on_error`.
    """

    def __init__(self, tokenizer: Any, settings: EncodingConfig, *, on_error: str = "raise") -> None:
        if on_error not in ON_ERROR:
            raise ConfigError(
                f"on_error is {on_error!r}; expected one of {', '.join(ON_ERROR)}{nearest(str(on_error), ON_ERROR)}"
            )
        self.tokenizer, self.settings, self.on_error = tokenizer, settings, on_error
        self._rows = RowEncoder(tokenizer, settings)
        self._control: NDArray[np.int32] | None = None

    def encode(self, rows: Sequence[Row], *, source: str, numbers: Sequence[int]) -> tuple[pa.Table, Ledger]:
        """Encode rows.

        Args:
            rows: the rows, of one format a source.
            source: source of rows that name none.
            numbers: number of each row in its source.

        Returns:
            A table with `input_ids` and `labels` (list of int32; no `labels` where every token of every row is trained,
            but for what stands before a text), `source` and `row`; and the ledger of the batch.

        Raises:
            DataError: a row that cannot be used; names source and row.
        """
        if (columns := self._text_columns(rows)) is not None:
            done = self._texts(rows, columns, source, numbers)
            if done is not None:
                return done
        ledger = Ledger()
        labelled, sources, kept = self._rows.encode(
            rows, source=source, numbers=numbers, ledger=ledger, skip=self.on_error == "skip"
        )
        table = labelled.to_table().append_column("source", pa.array(sources, pa.string()))
        return table.append_column("row", pa.array(kept, pa.int64())), ledger

    def _text_columns(self, rows: Sequence[Row]) -> set[str] | None:
        """The columns of rows that are all plain texts, trained whole; None where one of them is not."""
        if not self.settings.splits_documents or set(map(type, rows)) != {dict}:
            return None
        shapes = set(map(tuple, rows))
        if not all("text" in shape and _FORMAT_COLUMNS.isdisjoint(shape) for shape in shapes):
            return None
        return set().union(*shapes) if set(map(type, map(_TEXT, rows))) == {str} else None

    def _texts(
        self, rows: Sequence[Row], columns: set[str], source: str, numbers: Sequence[int]
    ) -> tuple[pa.Table, Ledger] | None:
        """Table and ledger of plain texts, or None where one of them needs the care of the other path."""
        ledger = Ledger()
        texts = list(map(_TEXT, rows))
        try:
            ids, offsets = text_encoder(self.tokenizer).encode_ids(texts)
        except FormatError:  # a character without a token; the other path names the row
            return None
        if self.settings.control_tokens == "plain" and self._holds_control(ids):
            return None
        before, after = self._rows.frame
        if len(before) > 1:  # only a first token is untrained without a label of its own
            return None
        said = ~np.fromiter(map(str.isspace, texts), bool, len(texts)) & (np.diff(offsets) > 0)
        ids, offsets, empty = _framed(ids, offsets, said, before, after)
        names, of = [source], np.zeros(len(rows), np.int64)
        if "source" in columns:
            found, of = np.unique([str(row.get("source") or source) for row in rows], return_inverse=True)
            names = found.tolist()
        if "row" in columns:
            numbers = [row["row"] if type(row.get("row")) is int else n for row, n in zip(rows, numbers, strict=True)]
        for code, name in enumerate(names):
            account, mine = ledger[name], of == code
            tokens = int(np.diff(offsets)[of[said] == code].sum())
            account.rows_in += int(mine.sum())
            account.rows_out += int((mine & said).sum())
            account.tokens_in += tokens
            account.masked += len(before) * int((mine & said).sum())
            account.trained += tokens - len(before) * int((mine & said).sum())
            for i in np.flatnonzero(mine & ~said):
                account.tokens_in += int(empty[i])
                account.drop(UNSUPERVISED, tokens=int(empty[i]), row=numbers[int(i)])
        kept = np.flatnonzero(said)
        return pa.table(
            {
                "input_ids": pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(ids)).cast(pa.list_(pa.int32())),
                "source": pa.array(names, pa.string()).take(pa.array(of[kept])),
                "row": pa.array(np.asarray(numbers, np.int64)[kept]),
            }
        ), ledger

    def _holds_control(self, ids: NDArray[np.int32]) -> bool:
        """Whether a text turned into an id that no text may turn into: those of the tokens that other texts are wrapped
        for."""
        if self._control is None:
            added = self.tokenizer.added_tokens_encoder
            known = [added[token] for token in control_tokens(self.tokenizer, "") if token in added]
            self._control = np.array(sorted(known), np.int32)
        if not len(self._control):
            return False
        # They mostly lie side by side, so that two comparisons tell.
        near = (ids >= self._control[0]) & (ids <= self._control[-1])
        return bool(near.any()) and bool(np.isin(ids[near], self._control).any())


def _framed(
    ids: NDArray[np.int32], offsets: NDArray[np.int64], said: NDArray[np.bool_], before: list[int], after: list[int]
) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]:
    """The texts that say something, each between `before` and `after`; the offsets of these; and the sizes of all as
    they were. A text that ends with `after` already gets no second one."""
    sizes = np.diff(offsets)
    if not said.all():
        ids = ids[np.repeat(said, sizes)]
    kept = sizes[said]
    ends = np.cumsum(kept)
    if not len(kept):
        return ids[:0], np.zeros(1, np.int64), sizes
    room = make_room(
        np.concatenate(([0], ends)), np.full(len(kept), len(before)), np.asarray(ids[ends - 1] != after[0])
    )
    framed = np.empty(room.offsets[-1], np.int32)
    framed[room.text] = ids
    framed[room.before] = np.tile(before, len(kept))
    framed[room.after] = after[0]
    return framed, room.offsets, sizes
