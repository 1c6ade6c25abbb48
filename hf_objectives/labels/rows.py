"""Encode rows of any accepted format in five steps: render, tokenise, frame, limit, account.

    rows --render--> text and trained spans --tokenise--> ids and labels --frame--> BOS and EOS around documents
         --limit--> at most `max_length` tokens --account--> a ledger, and the rows that train a token

The first three, for one row, are in `pieces.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_objectives.errors import DataError, FormatError
from hf_objectives.labels.chat import Labelled, cut
from hf_objectives.labels.config import EncodingConfig, LabelConfig
from hf_objectives.labels.conversation import Message
from hf_objectives.labels.formats import Kind, detect_format, to_example
from hf_objectives.labels.ledger import SKIPPED, Ledger, account_rows
from hf_objectives.labels.overlength import concatenate, expand, fitting_turns, select
from hf_objectives.labels.pieces import Piece, PieceEncoder
from hf_objectives.labels.tokenization import text_encoder
from hf_objectives.types import IGNORE_INDEX, TOO_DEEP, Row

Numbers = Sequence[int] | None
Errors = list[DataError] | None


class RowEncoder(PieceEncoder):
    """Encodes many rows under one tokenizer and one configuration.

    Args:
        tokenizer: a fast transformers tokenizer.
        config: how rows become ids and labels.
    """

    def __init__(self, tokenizer: Any, config: EncodingConfig) -> None:
        super().__init__(tokenizer, config)
        self.config: EncodingConfig = config
        self._formats: dict[str, str] = {}  # of each source

    def encode(
        self, rows: Sequence[Row], *, source: str, ledger: Ledger, numbers: Numbers = None, skip: bool = False
    ) -> tuple[Labelled, list[str], list[int]]:
        """Encode rows, and leave out those that are too long or train nothing.

        Args:
            rows: the rows, of one format per source.
            source: source of rows that name none in `source`.
            ledger: counts what happened to every token.
            numbers: number of each row that has none of its own in `row`; None counts from 0.
            skip: leave out and count a row that cannot be used, instead of raising its error.

        Returns:
            The kept rows, the source of each, and the number of the row that each came from.

        Raises:
            DataError: a row that cannot be used; names source and row.
        """
        refused: Errors = [] if skip else None
        pieces = self.render(rows, source, ledger, numbers, refused)
        try:
            labelled = self.tokenise(pieces)
        except FormatError:  # a character without a token, in one of the texts
            pieces = self._with_tokens(pieces, refused)
            labelled = self.tokenise(pieces)
        for error in sorted(refused or (), key=lambda error: error.row or 0):
            ledger[error.source or source].drop(type(error).__name__ + SKIPPED, tokens=0, row=error.row)
        pieces, labelled = self.split(pieces, self.frame(pieces, labelled))
        cut_off, fits = self.limit(pieces, labelled)
        sources, origins = [piece.source for piece in pieces], [piece.row for piece in pieces]
        trained = np.diff(np.concatenate(([0], np.cumsum(cut_off.labels != IGNORE_INDEX)))[cut_off.offsets])
        whole, left = np.diff(labelled.offsets), np.diff(cut_off.offsets)
        kept = account_rows(ledger, sources, origins, whole, left, trained, fits)
        if len(kept) < len(pieces):
            cut_off = select(cut_off, kept)
        return cut_off, [sources[i] for i in kept], [origins[i] for i in kept]

    def render(
        self, rows: Sequence[Row], source: str, ledger: Ledger, numbers: Numbers = None, refused: Errors = None
    ) -> list[Piece]:
        """Read rows and render them to text with trained spans; rows that have ids come last.

        `refused` gets the error of each row that cannot be used; where it is None, the error is raised.
        """
        pieces: list[Piece] = []
        for position, row in zip(range(len(rows)) if numbers is None else numbers, rows, strict=True):
            columns = row if isinstance(row, Mapping) else {}
            own, name = columns.get("row"), str(columns.get("source") or source)
            number = own if isinstance(own, int) else position
            ledger[name].rows_in += 1
            try:
                pieces += self._pieces(row, number, name)
            except (DataError, RecursionError) as raised:
                error = raised if isinstance(raised, DataError) else FormatError(TOO_DEEP)
                error.at(source=name, row=number)
                if refused is None:
                    raise error from None
                refused.append(error)
        pieces.sort(key=lambda piece: piece.example.kind is Kind.TOKENS)
        return pieces

    def _pieces(self, row: Row, number: int, source: str) -> list[Piece]:
        format = detect_format(row)
        expected = self._formats.setdefault(source, format)
        if format != expected:
            raise FormatError(
                f"a row in {format} format among rows in {expected} format; expected one format per source"
            )
        example = to_example(row, format=format)
        if not (self.config.expand_turns and example.messages):
            return [self.piece(example, number, source)]
        turns = [replace(example, messages=messages) for messages in expand(example.messages)]
        return [self.piece(turn, number, source) for turn in turns]

    def _with_tokens(self, pieces: Sequence[Piece], refused: Errors) -> list[Piece]:
        """The pieces whose texts the tokenizer has tokens for; see `render` for the others."""
        kept = []
        for piece in pieces:
            try:
                text_encoder(self.tokenizer).check(piece.rendered.text)
            except DataError as error:
                error.at(source=piece.source, row=piece.row)
                if refused is None:
                    raise error from None
                refused.append(error)
            else:
                kept.append(piece)
        return kept

    def split(self, pieces: list[Piece], labelled: Labelled) -> tuple[list[Piece], Labelled]:
        """Under "split_turns", replace each conversation that is too long by conversations of whole user turns."""
        limit, sizes = self.config.max_length, np.diff(labelled.offsets)
        if limit is None or self.config.overlength != "split_turns" or not (sizes > limit).any():
            return pieces, labelled
        parts: list[Piece] = []
        order: list[int] = []  # of the pieces and then the parts
        for i, piece in enumerate(pieces):
            made = self._parts(piece, limit) if sizes[i] > limit and piece.example.messages else []
            order += range(len(pieces) + len(parts), len(pieces) + len(parts) + len(made)) if made else [i]
            parts += made
        everything = [*pieces, *parts]
        labelled = select(concatenate([labelled, self.tokenise(parts)]), np.array(order))
        return [everything[i] for i in order], labelled

    def _parts(self, piece: Piece, limit: int) -> list[Piece]:
        chat, tools = self.chat(piece.example), piece.example.tools

        def size(messages: list[Message]) -> int:
            return int(chat.encode([chat.render(messages, tools, require_trained=False)]).offsets[-1])

        turns = fitting_turns(piece.example.messages, size, limit)
        return [replace(piece, rendered=chat.render(messages, tools, require_trained=False)) for messages in turns]

    def limit(self, pieces: Sequence[Piece], labelled: Labelled) -> tuple[Labelled, NDArray[np.bool_]]:
        """Cut pieces that are too long under "cut", else say which fit, bool [pieces]; see `EncodingConfig`."""
        limit, sizes = self.config.max_length, np.diff(labelled.offsets)
        too_long = sizes > limit if limit is not None else np.zeros(len(pieces), bool)
        if self.config.splits_documents:
            too_long &= np.fromiter((piece.example.kind is not Kind.TEXT for piece in pieces), bool, len(pieces))
        if self.config.overlength != "cut":
            return labelled, ~too_long
        if limit is not None and too_long.any():
            labelled = cut(labelled, np.where(too_long, limit, sizes))
        return labelled, np.ones(len(pieces), bool)


def encode_row(
    tokenizer: Any, row: Row, *, source: str | None = None, row_index: int | None = None, **options: Any
) -> dict[str, list[int]]:
    """Ids and labels of one row in any accepted format.

    Documents are trained whole and end with one EOS. What is beyond `max_length` is cut off; a turn that the cut goes
    through is not trained at all, so that a row can end up without a label. The collators check that.

    Args:
        tokenizer: a fast transformers tokenizer.
        row: a mapping of column names to values, see `formats.py`.
        source, row_index: name and number of the row, for errors.
        options: `max_length`, `train_on`, `control_tokens`, `chat_template` and `template_kwargs`, see `LabelConfig`; every
            other keyword is a variable of the chat template.

    Returns:
        `input_ids` and `labels`, lists of int of the same length, unshifted, -100 where a token is not trained.

    Raises:
        DataError: the row cannot be used; names source and row where given.
        ConfigError: an unknown option, or `max_length` under 2.
    """
    encoder = PieceEncoder(tokenizer, LabelConfig.from_keywords(options))
    return encoder.encode_one(row, source=source, number=row_index).row(0)
