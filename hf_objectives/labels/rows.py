"""Encode rows of any accepted format in five steps: render, tokenise, frame, limit, account.

row --render--> text and trained spans --tokenise--> ids and labels --frame--> BOS and EOS around documents
    --limit--> at most `max_length` tokens --account--> a ledger, and the rows that train a token
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_objectives.errors import DataError, FormatError
from hf_objectives.labels.chat import ChatEncoder, Labelled, chat_encoder, cut, label_spans
from hf_objectives.labels.config import EncodingConfig, LabelConfig
from hf_objectives.labels.formats import Example, Kind, detect_format, to_example
from hf_objectives.labels.framing import Frame, document_frame, frame_documents
from hf_objectives.labels.ledger import SKIPPED, Ledger, account_rows
from hf_objectives.labels.messages import ControlTokens
from hf_objectives.labels.overlength import concatenate, expand, fitting_turns, select
from hf_objectives.labels.spans import Rendered
from hf_objectives.labels.templates import control_tokens
from hf_objectives.labels.tokenization import text_encoder, vocabulary_size
from hf_objectives.labels.turns import Message
from hf_objectives.types import IGNORE_INDEX, Row

Numbers = Sequence[int] | None
Errors = list[DataError] | None


@dataclass(frozen=True, slots=True)
class Piece:
    """What one encoded row is made from: a row, or a part of one where a conversation is expanded or split.

    Attributes:
        row: number of the row in its source.
        source: name of the source.
        example: the row as it was read.
        rendered: its text and the spans of it that are trained; no text where the row has ids.
        framed: whether it gets BOS and EOS, as texts do that train more than white space.
    """

    row: int
    source: str
    example: Example
    rendered: Rendered
    framed: bool = False


class RowEncoder:
    """Encodes rows under one tokenizer and one configuration.

    Args:
        tokenizer: a fast transformers tokenizer.
        config: how rows become ids and labels.
    """

    def __init__(self, tokenizer: Any, config: EncodingConfig) -> None:
        self.tokenizer, self.config = tokenizer, config
        self._formats: dict[str, str] = {}  # of each source
        self._chat_encoder: ChatEncoder | None = None  # for rows without template variables of their own

    def encode(
        self, rows: Sequence[Row], *, source: str, ledger: Ledger, numbers: Numbers = None, refused: Errors = None
    ) -> tuple[Labelled, list[str], list[int]]:
        """Encode rows, and leave out those that are too long or train nothing.

        Args:
            rows: the rows, of one format per source.
            source: source of rows that name none in `source`.
            ledger: counts what happened to every token.
            numbers: number of each row that has none of its own in `row`; None counts from 0.
            refused: gets the error of each row that cannot be used, and the row is left out; None raises the error.

        Returns:
            The kept rows, the source of each, and the number of the row that each came from.

        Raises:
            DataError: a row that cannot be used; names source and row.
        """
        errors: Errors = None if refused is None else []
        pieces = self.render(rows, source, ledger, numbers, errors)
        try:
            labelled = self.tokenise(pieces)
        except FormatError:  # a character without a token, in one of the texts
            pieces = self._with_tokens(pieces, errors)
            labelled = self.tokenise(pieces)
        for error in sorted(errors or (), key=lambda error: error.row or 0):
            ledger[error.source or source].drop(type(error).__name__ + SKIPPED, tokens=0, row=error.row)
        if refused is not None:
            refused += errors or ()
        pieces, labelled = self.split(pieces, self.frame(pieces, labelled))
        cut_off, fits = self.limit(pieces, labelled)
        sources, origins = [piece.source for piece in pieces], [piece.row for piece in pieces]
        trained = np.diff(np.concatenate(([0], np.cumsum(cut_off.labels != IGNORE_INDEX)))[cut_off.offsets])
        whole, left = np.diff(labelled.offsets), np.diff(cut_off.offsets)
        kept = account_rows(ledger, sources, origins, whole, left, trained, fits)
        if len(kept) < len(pieces):
            cut_off = select(cut_off, kept)
        return cut_off, [sources[i] for i in kept], [origins[i] for i in kept]

    def encode_one(self, row: Row, *, source: str | None = None, number: int | None = None) -> Labelled:
        """Encode one row of any format. What is beyond `max_length` is cut off; nothing else is left out.

        Raises:
            DataError: the row cannot be used; names source and row where given.
        """
        try:
            piece = self._piece(to_example(row), number or 0, source or "")
            labelled = self.tokenise([piece])
        except DataError as error:
            raise error.at(source=source, row=number) from None
        if piece.framed:
            labelled = self.frame([piece], labelled)
        limit = self.config.max_length
        return labelled if limit is None else cut(labelled, limit)

    def encode_texts(self, examples: Sequence[Example]) -> Labelled:
        """Ids and labels of texts, each with its BOS and EOS; nothing is cut off or left out."""
        pieces = [Piece(i, "", example, self.render_text(example), framed=True) for i, example in enumerate(examples)]
        return self.frame(pieces, self.tokenise(pieces))

    # -- render --------------------------------------------------------------------------------------------------

    def render(
        self, rows: Sequence[Row], source: str, ledger: Ledger, numbers: Numbers = None, refused: Errors = None
    ) -> list[Piece]:
        """Read rows and render them to text with trained spans; see `encode`. Rows that have ids come last."""
        pieces: list[Piece] = []
        for position, row in zip(range(len(rows)) if numbers is None else numbers, rows, strict=True):
            columns = row if isinstance(row, Mapping) else {}
            own, name = columns.get("row"), str(columns.get("source") or source)
            number = own if isinstance(own, int) else position
            ledger[name].rows_in += 1
            try:
                pieces += self._pieces(row, number, name)
            except DataError as error:
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
            return [self._piece(example, number, source)]
        turns = [replace(example, messages=messages) for messages in expand(example.messages)]
        return [self._piece(turn, number, source) for turn in turns]

    def _piece(self, example: Example, number: int, source: str) -> Piece:
        if example.kind is Kind.TOKENS:
            return Piece(number, source, self._checked_ids(example), Rendered("", []))
        if example.is_plain:
            rendered = self.render_text(example)
            return Piece(number, source, example, rendered, framed=bool(rendered.spans))
        rendered = self._chat(example).render(example.messages, example.tools, require_trained=False)
        return Piece(number, source, example, rendered)

    def render_text(self, example: Example) -> Rendered:
        """The text of a document or of prompt and completion, with the span that is trained; none where that is blank."""
        prompt, body = example.text[: example.prompt_chars], example.text[example.prompt_chars :]
        if not body.strip():
            return Rendered(example.text, [])
        if example.kind is Kind.PREFERENCE and self.tokenizer.eos_token:
            body = body.removesuffix(self.tokenizer.eos_token)  # as in TRL: no second EOS
        if self.config.control_tokens == "plain":
            prompt, body = self._control_tokens.wrap_all([prompt, body])
        text, begin = prompt + body, 0 if self.config.train_on == "all" else len(prompt)
        return Rendered(text, [(begin, len(text))])

    @cached_property
    def _control_tokens(self) -> ControlTokens:
        return ControlTokens(control_tokens(self.tokenizer, ""))

    def _chat(self, example: Example) -> ChatEncoder:
        encoder = None if example.template_kwargs else self._chat_encoder
        if encoder is None:
            encoder = chat_encoder(
                self.tokenizer,
                chat_template=self.config.chat_template,
                train_on=self.config.train_on,
                control_tokens=self.config.control_tokens,
                template_kwargs={**self.config.template_kwargs, **example.template_kwargs},
            )
            if not example.template_kwargs:
                self._chat_encoder = encoder
        return encoder

    def _checked_ids(self, example: Example) -> Example:
        """The example with its ids and labels as int64 arrays of one length, all of them ids of the tokenizer."""
        ids = np.asarray(example.input_ids, np.int64)
        labels = ids if example.labels is None else np.asarray(example.labels, np.int64)
        if ids.ndim != 1 or labels.shape != ids.shape or not len(ids):
            raise FormatError(
                f"input_ids of shape {ids.shape} and labels of shape {labels.shape}; expected two lists of one length"
            )
        for name, values in (("id", ids), ("label", labels[labels != IGNORE_INDEX])):
            if not len(values) or (values.min() >= 0 and values.max() < len(self.tokenizer)):
                continue
            size = vocabulary_size(self.tokenizer)  # slow, but knows of ids beyond gaps
            if len(wrong := values[(values < 0) | (values >= size)]):
                raise FormatError(
                    f"{name} {wrong[0]} is not one of the tokenizer's, 0 to {size - 1}; expected rows that this tokenizer "
                    "encoded"
                )
        return replace(example, input_ids=ids, labels=labels)

    # -- tokenise ------------------------------------------------------------------------------------------------

    def tokenise(self, pieces: Sequence[Piece]) -> Labelled:
        """Ids and labels of pieces; a token is trained when it lies in a trained span. Pieces with ids come last."""
        rendered = [piece.rendered for piece in pieces if piece.example.kind is not Kind.TOKENS]
        labelled = label_spans(text_encoder(self.tokenizer).encode_batch([one.text for one in rendered]), rendered)
        if len(rendered) == len(pieces):
            return labelled
        return concatenate([labelled, *(_from_ids(piece.example) for piece in pieces[len(rendered) :])])

    def _with_tokens(self, pieces: Sequence[Piece], refused: Errors) -> list[Piece]:
        """The pieces whose texts the tokenizer has tokens for; see `encode` for the others."""
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

    # -- frame ---------------------------------------------------------------------------------------------------

    @cached_property
    def document_frame(self) -> Frame:
        """The ids around a document."""
        return document_frame(self.tokenizer)

    def frame(self, pieces: Sequence[Piece], labelled: Labelled) -> Labelled:
        """Put BOS, untrained, before each document and EOS, trained, after it.

        The EOS of a completion belongs to its trained run. A text has no run, so it may be cut anywhere.
        """
        documents = np.fromiter((piece.framed for piece in pieces), bool, len(pieces))
        if not documents.any():
            return labelled
        made = frame_documents(labelled.ids, labelled.offsets, self.document_frame, documents)
        labels = np.full(len(made.ids), IGNORE_INDEX, np.int32)
        labels[made.own], labels[made.offsets[1:][made.closed] - 1] = labelled.labels, self.document_frame.after
        rows, before = labelled.span_rows, len(self.document_frame.before) * documents
        spans = labelled.spans + (made.offsets[:-1] + before - labelled.offsets[:-1])[rows, None]
        spans[:, 1] += made.closed[rows]
        is_run = np.fromiter((piece.example.kind is not Kind.TEXT for piece in pieces), bool, len(pieces))[rows]
        return Labelled(made.ids, labels, made.offsets, spans[is_run], rows[is_run])

    # -- limit ---------------------------------------------------------------------------------------------------

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
        chat, tools = self._chat(piece.example), piece.example.tools

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
    config = EncodingConfig(**LabelConfig.from_keywords(options).options())
    return RowEncoder(tokenizer, config).encode_one(row, source=source, number=row_index).row(0)


def _from_ids(example: Example) -> Labelled:
    # Each trained token is a run of its own: where the turns end is not known.
    trained = np.flatnonzero(example.labels != IGNORE_INDEX)
    spans, offsets = np.stack([trained, trained + 1], axis=1), np.array([0, len(example.input_ids)])
    return Labelled(
        example.input_ids.astype(np.int32), example.labels.astype(np.int32), offsets, spans, np.zeros_like(trained)
    )
