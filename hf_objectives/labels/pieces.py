"""Encode one row, or one part of a row: render it to text with trained spans, tokenise, put BOS and EOS around documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_objectives.errors import DataError, FormatError
from hf_objectives.labels.chat import ChatEncoder, Labelled, chat_encoder, cut, label_spans
from hf_objectives.labels.config import LabelConfig
from hf_objectives.labels.formats import Example, Kind, to_example
from hf_objectives.labels.framing import Frame, document_frame, frame_documents
from hf_objectives.labels.messages import ControlTokens
from hf_objectives.labels.overlength import concatenate
from hf_objectives.labels.spans import Rendered
from hf_objectives.labels.templates import control_tokens
from hf_objectives.labels.tokenization import text_encoder, vocabulary_size
from hf_objectives.types import IGNORE_INDEX, TOO_DEEP, Row


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


def _whole_numbers(values: Any) -> NDArray[np.int64]:
    found = np.asarray(values)
    if found.size and found.dtype.kind not in "iuf":
        raise ValueError(f"found {found.flat[0]!r}")
    ids = found.astype(np.int64)
    if (found != ids).any():
        raise ValueError(f"found {found[found != ids].flat[0]}")
    return ids


class PieceEncoder:
    """Encodes rows one by one, under one tokenizer and one configuration.

    Args:
        tokenizer: a fast transformers tokenizer.
        config: how a row becomes ids and labels.
    """

    def __init__(self, tokenizer: Any, config: LabelConfig) -> None:
        self.tokenizer, self.config = tokenizer, config
        self._chat_encoder: ChatEncoder | None = None  # for rows without template variables of their own

    def encode_one(self, row: Row, *, source: str | None = None, number: int | None = None) -> Labelled:
        """Encode one row of any format. What is beyond `max_length` is cut off; nothing else is left out.

        Raises:
            DataError: the row cannot be used; names source and row where given.
        """
        try:
            piece = self.piece(to_example(row))
            labelled = self.tokenise([piece])
        except DataError as error:
            raise error.at(source=source, row=number) from None
        except RecursionError:
            raise FormatError(TOO_DEEP, source=source, row=number) from None
        if piece.framed:
            labelled = self.frame([piece], labelled)
        limit = self.config.max_length
        return labelled if limit is None else cut(labelled, limit)

    def encode_texts(self, examples: Sequence[Example]) -> Labelled:
        """Ids and labels of texts, each with its BOS and EOS; nothing is cut off or left out."""
        pieces = [Piece(i, "", example, self._render_text(example), framed=True) for i, example in enumerate(examples)]
        return self.frame(pieces, self.tokenise(pieces))

    # -- render --------------------------------------------------------------------------------------------------

    def piece(self, example: Example, number: int = 0, source: str = "") -> Piece:
        """Render a row to text with trained spans: documents as they are, conversations by the chat template."""
        if example.kind is Kind.TOKENS:
            return Piece(number, source, self._checked_ids(example), Rendered("", []))
        if example.is_plain:
            rendered = self._render_text(example)
            return Piece(number, source, example, rendered, framed=bool(rendered.spans))
        rendered = self.chat(example).render(example.messages, example.tools, require_trained=False)
        return Piece(number, source, example, rendered)

    def _render_text(self, example: Example) -> Rendered:
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

    def chat(self, example: Example) -> ChatEncoder:
        """What renders a conversation, with the row's own template variables."""
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
        try:
            ids = _whole_numbers(example.input_ids)
            labels = ids if example.labels is None else _whole_numbers(example.labels)
        except (TypeError, ValueError, OverflowError) as error:
            raise FormatError(f"input_ids and labels are no lists of integers ({error!s:.80})") from error
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


def _from_ids(example: Example) -> Labelled:
    # Each trained token is a run of its own: where the turns end is not known.
    trained = np.flatnonzero(example.labels != IGNORE_INDEX)
    spans, offsets = np.stack([trained, trained + 1], axis=1), np.array([0, len(example.input_ids)])
    return Labelled(
        example.input_ids.astype(np.int32), example.labels.astype(np.int32), offsets, spans, np.zeros_like(trained)
    )
