"""Rows of any accepted format to token ids and labels, under one over-length policy and with every token booked."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_objectives.errors import DataError, FormatError, TokenizerError
from hf_objectives.labels.byte_lengths import vocabulary_size
from hf_objectives.labels.chat import ChatEncoder, Labelled, chat_encoder, cut, label_spans
from hf_objectives.labels.config import EncodingConfig
from hf_objectives.labels.formats import Example, detect_format, to_example
from hf_objectives.labels.framing import make_room
from hf_objectives.labels.ledger import Ledger
from hf_objectives.labels.messages import ControlTokens
from hf_objectives.labels.spans import Rendered
from hf_objectives.labels.templates import control_tokens
from hf_objectives.labels.tokenization import text_encoder
from hf_objectives.types import IGNORE_INDEX, Row

TOO_LONG, CUT, UNSUPERVISED = "longer than max_length", "cut at max_length", "nothing supervised"
SKIPPED = ", skipped"  # behind the error that a row would have been


@dataclass(frozen=True, slots=True)
class _Unit:
    """One row to be: its text and spans (or its ready ids), and the row and the conversation that it came from."""

    row: int
    source: str
    rendered: Rendered
    document: bool = False
    example: Example | None = None


class RowEncoder:
    """Encodes rows under fixed settings; see `prepare_dataset`.

    Args:
        tokenizer: a fast transformers tokenizer.
        settings: the policies.
    """

    def __init__(self, tokenizer: Any, settings: EncodingConfig) -> None:
        self.tokenizer, self.settings = tokenizer, settings
        self._formats: dict[str, str] = {}
        self._plain_chat: ChatEncoder | None = None
        self._documents: ControlTokens | None = None
        self._frame: tuple[list[int], list[int]] | None = None

    def encode(
        self,
        rows: Sequence[Row],
        *,
        source: str,
        numbers: Sequence[int] | None = None,
        ledger: Ledger,
        skip: bool = False,
    ) -> tuple[Labelled, list[str], list[int]]:
        """Encode rows, book them, and leave out what the policies leave out.

        Args:
            rows: the rows.
            source: source of rows that name none.
            numbers: number of each row that carries none of its own in `row`; from 0 when None.
            ledger: is given what became of every token.
            skip: leave out and book a row that cannot be used, instead of the error.

        Returns:
            The kept rows, the source of each, and the number of the row that each came from.

        Raises:
            DataError: a row that cannot be used; names source and row.
        """
        units: list[_Unit] = []
        ready: list[_Unit] = []
        for position, row in zip(range(len(rows)) if numbers is None else numbers, rows, strict=True):
            own = row.get("row") if isinstance(row, Mapping) else None
            n = own if isinstance(own, int) else position
            name = str(row.get("source") or source) if isinstance(row, Mapping) else source
            ledger[name].rows_in += 1
            try:
                made = list(self._units(row, n, name))
                for unit in made:
                    text_encoder(self.tokenizer).check(unit.rendered.text)
            except DataError as error:
                if not skip:
                    raise error.at(source=name, row=n) from None
                ledger[name].drop(type(error).__name__ + SKIPPED, tokens=0, row=n)
                continue
            for unit in made:
                (ready if unit.example is not None and unit.example.kind == "tokens" else units).append(unit)
        labelled = self._label(units)
        limit = self.settings.max_length
        if limit is not None and self.settings.overlength == "split_turns":
            units, labelled = self._split(units, labelled, limit)
        if ready:
            labelled, units = _concatenate([labelled, self._given(ready)]), units + ready
        return self._keep(units, labelled, ledger)

    # -- rows to text --------------------------------------------------------------------------------------------

    def _units(self, row: Row, n: int, source: str) -> Iterator[_Unit]:
        format = detect_format(row)
        expected = self._formats.setdefault(source, format)
        if format != expected:
            raise FormatError(f"a row in {format} format among rows in {expected} format; expected one format a source")
        example = to_example(row, format=format)
        if example.kind == "tokens":
            yield _Unit(n, source, Rendered("", []), example=example)
        elif example.is_plain:
            completion = example if example.kind != "text" else None
            said = example.text[example.prompt_chars :].strip() != ""
            rendered = self._document(example) if said else Rendered(example.text, [])
            yield _Unit(n, source, rendered, document=said, example=completion)
        else:
            chat = self._chat(example)
            for messages in expand(example.messages) if self.settings.expand_turns else (example.messages,):
                rendered = chat.render(messages, example.tools, require_trained=False)
                yield _Unit(n, source, rendered, example=example)

    def _chat(self, example: Example) -> ChatEncoder:
        if self._plain_chat is None:
            self._plain_chat = self._chat_with({})
        return self._chat_with(example.template_kwargs) if example.template_kwargs else self._plain_chat

    def _chat_with(self, template_kwargs: Mapping[str, Any]) -> ChatEncoder:
        return chat_encoder(
            self.tokenizer,
            chat_template=self.settings.chat_template,
            train_on=self.settings.train_on,
            control_tokens=self.settings.control_tokens,
            template_kwargs={**self.settings.template_kwargs, **template_kwargs},
        )

    def encode_texts(self, examples: Sequence[Example]) -> Labelled:
        """Ids and labels of plain text with a prompt, as `encode` makes them, each with its BOS and EOS."""
        return self._label([_Unit(i, "", self._document(one), True, one) for i, one in enumerate(examples)])

    def _document(self, example: Example) -> Rendered:
        text, at = example.text, example.prompt_chars
        if example.kind == "preference" and self.tokenizer.eos_token:
            # As in TRL, an answer that ends with EOS already is given no second one.
            text = text[:at] + text[at:].removesuffix(self.tokenizer.eos_token)
        if self.settings.control_tokens == "plain":
            if self._documents is None:
                self._documents = ControlTokens(control_tokens(self.tokenizer, ""))
            prompt, body = self._documents.wrap_all([text[:at], text[at:]])
            text, at = prompt + body, len(prompt)
        return Rendered(text, [(0 if self.settings.train_on == "all" else at, len(text))])

    # -- text to ids ---------------------------------------------------------------------------------------------

    def _label(self, units: Sequence[_Unit]) -> Labelled:
        rendered = [unit.rendered for unit in units]
        labelled = label_spans(text_encoder(self.tokenizer).encode_batch([one.text for one in rendered]), rendered)
        documents = np.fromiter((unit.document for unit in units), bool, len(units))
        if not documents.any():
            return labelled
        texts = np.fromiter((unit.document and unit.example is None for unit in units), bool, len(units))
        return self._framed(labelled, documents, texts)

    def _framed(self, labelled: Labelled, documents: NDArray[np.bool_], texts: NDArray[np.bool_]) -> Labelled:
        """Documents with what the tokenizer puts before a text (BOS), untrained, and one EOS after it, trained.

        The run of a completion grows by its EOS; a text is no run, it may be cut anywhere.
        """
        before, after = self.frame
        sizes, ends = np.diff(labelled.offsets), labelled.offsets[1:]
        # A document whose text ends with EOS already (control_tokens="allow") gets no second one.
        ended = (sizes > 0) & (labelled.ids[np.maximum(ends - 1, 0)] == after[0]) if len(labelled.ids) else sizes < 0
        room = make_room(labelled.offsets, len(before) * documents, documents & ~ended)
        ids, labels = np.empty(room.offsets[-1], np.int32), np.empty(room.offsets[-1], np.int32)
        ids[room.text], labels[room.text] = labelled.ids, labelled.labels
        ids[room.before], labels[room.before] = np.tile(before, int(documents.sum())), IGNORE_INDEX
        ids[room.after] = labels[room.after] = after[0]
        rows = labelled.span_rows
        runs = labelled.spans + (room.offsets - labelled.offsets)[rows, None] + (len(before) * documents)[rows, None]
        runs[:, 1] += (documents & ~ended)[rows]
        return Labelled(ids, labels, room.offsets, runs[~texts[rows]], rows[~texts[rows]])

    @property
    def frame(self) -> tuple[list[int], list[int]]:
        """The ids that come before a document (BOS, where the tokenizer adds one) and after it (EOS).

        Raises:
            TokenizerError: the tokenizer has no EOS token.
        """
        if self._frame is None:
            eos = self.tokenizer.eos_token_id
            if eos is None:
                raise TokenizerError(
                    "the tokenizer has no EOS token; set tokenizer.eos_token, documents must end with one"
                )
            framed = self.tokenizer("a")["input_ids"]
            bare = self.tokenizer("a", add_special_tokens=False)["input_ids"]
            before = framed[: next(i for i in range(len(framed)) if framed[i : i + len(bare)] == bare)]
            self._frame = list(before), [eos]
        return self._frame

    def _given(self, units: Sequence[_Unit]) -> Labelled:
        """Rows that came as ids."""
        ids, labels = [], []
        for unit in units:
            example = unit.example
            assert example is not None
            given = np.asarray(example.input_ids, np.int64)
            target = given if example.labels is None else np.asarray(example.labels, np.int64)
            if given.ndim != 1 or target.shape != given.shape or not len(given):
                raise FormatError(
                    f"input_ids of shape {given.shape} and labels of shape {target.shape}; expected two lists of one length",
                    source=unit.source,
                    row=unit.row,
                )
            for name, of in (("id", given), ("label", target[target != IGNORE_INDEX])):
                if not len(of) or (of.min() >= 0 and of.max() < len(self.tokenizer)):
                    continue
                size = vocabulary_size(self.tokenizer)  # which walks through it; `len` does not know of gaps
                if len(wrong := of[(of < 0) | (of >= size)]):
                    raise FormatError(
                        f"{name} {wrong[0]} is not one of the tokenizer's, 0 to {size - 1}; "
                        "expected rows that this tokenizer encoded",
                        source=unit.source,
                        row=unit.row,
                    )
            ids.append(given)
            labels.append(target)
        offsets = np.concatenate(([0], np.cumsum([len(row) for row in ids])))
        flat = np.concatenate(labels)
        # Each trained token is a run of its own: where the author's turns end is not known.
        at = np.flatnonzero(flat != IGNORE_INDEX)
        rows = np.searchsorted(offsets, at, "right") - 1
        return Labelled(
            np.concatenate(ids).astype(np.int32), flat.astype(np.int32), offsets, np.stack([at, at + 1], axis=1), rows
        )

    # -- over-length ---------------------------------------------------------------------------------------------

    def _split(self, units: list[_Unit], labelled: Labelled, limit: int) -> tuple[list[_Unit], Labelled]:
        """Replace each conversation that is too long by rows of whole user turns, each with the system message."""
        sizes = np.diff(labelled.offsets)
        if not (sizes > limit).any():
            return units, labelled
        kept, parts = [], []
        for i, unit in enumerate(units):
            if sizes[i] <= limit or unit.document or unit.example is None:
                kept.append(unit)
                parts.append(_slice(labelled, i))
                continue
            chat = self._chat(unit.example)
            for messages in _fitting(
                unit.example.messages, lambda m, c=chat, u=unit: self._size(c, m, u.example), limit
            ):
                rendered = chat.render(messages, unit.example.tools, require_trained=False)
                piece = _Unit(unit.row, unit.source, rendered, example=unit.example)
                kept.append(piece)
                parts.append(self._label([piece]))
        return kept, _concatenate(parts)

    def _size(self, chat: ChatEncoder, messages: list[dict], example: Example) -> int:
        return int(chat.encode([chat.render(messages, example.tools, require_trained=False)]).offsets[-1])

    def _keep(self, units: list[_Unit], labelled: Labelled, ledger: Ledger) -> tuple[Labelled, list[str], list[int]]:
        """Apply what is left of the policy, book every token and leave out rows that teach nothing."""
        limit = self.settings.max_length
        sizes = np.diff(labelled.offsets)
        too_long = sizes > limit if limit is not None else np.zeros(len(units), bool)
        if self.settings.splits_documents:
            too_long &= [not (unit.document and unit.example is None) for unit in units]
        if self.settings.overlength == "cut" and limit is not None and too_long.any():
            labelled = cut(labelled, np.where(too_long, limit, sizes))
        kept_sizes = np.diff(labelled.offsets)
        trained = (
            np.add.reduceat(np.append(labelled.labels != IGNORE_INDEX, False).astype(np.int64), labelled.offsets[:-1])
            * (kept_sizes > 0)
            if len(units)
            else np.zeros(0, np.int64)
        )
        keep = np.ones(len(units), bool)
        for i, unit in enumerate(units):
            account = ledger[unit.source]
            account.tokens_in += int(sizes[i])
            if too_long[i] and self.settings.overlength != "cut":
                account.drop(TOO_LONG, tokens=int(sizes[i]), row=unit.row)
                keep[i] = False
                continue
            if too_long[i]:
                account.drop(CUT, tokens=int(sizes[i] - kept_sizes[i]))
            if trained[i] == 0:
                account.drop(UNSUPERVISED, tokens=int(kept_sizes[i]), row=unit.row)
                keep[i] = False
                continue
            account.rows_out += 1
            account.trained += int(trained[i])
            account.masked += int(kept_sizes[i] - trained[i])
        kept = [unit for unit, stays in zip(units, keep, strict=True) if stays]
        if not keep.all():
            mask = np.repeat(keep, kept_sizes)
            offsets = np.concatenate(([0], np.cumsum(kept_sizes[keep])))
            none = np.empty((0, 2), np.int64)
            labelled = Labelled(labelled.ids[mask], labelled.labels[mask], offsets, none, np.empty(0, np.int64))
        return labelled, [unit.source for unit in kept], [unit.row for unit in kept]


def encode_row(
    tokenizer: Any,
    row: Row,
    *,
    max_length: int | None = None,
    train_on: str = "assistant",
    control_tokens: str = "plain",
    source: str | None = None,
    row_index: int | None = None,
    chat_template: str | None = None,
    **template_kwargs: Any,
) -> dict[str, list[int]]:
    """Ids and labels of one row in any accepted format; what is beyond `max_length` is cut off.

    Documents are trained whole and end with one EOS. A turn that the cut goes through is not trained at all, so a row
    can end up without a label; the collators count that.

    Returns:
        `input_ids` and `labels`, lists of int of the same length, unshifted, -100 where a token is not trained.

    Raises:
        DataError: the row cannot be used; names source and row where given.
    """
    settings = EncodingConfig(
        train_on=train_on,
        control_tokens=control_tokens,
        overlength="cut",
        chat_template=chat_template,
        template_kwargs=template_kwargs,
        max_length=max_length,
    )
    encoder = RowEncoder(tokenizer, settings)
    try:
        (unit,) = encoder._units(row, row_index or 0, source or "")
    except DataError as error:
        raise error.at(source=source, row=row_index) from None
    labelled = (
        encoder._given([unit]) if unit.example is not None and unit.example.kind == "tokens" else encoder._label([unit])
    )
    return (cut(labelled, max_length) if max_length is not None else labelled).row(0)


def expand(messages: Sequence[Mapping[str, Any]]) -> list[list[dict[str, Any]]]:
    """One conversation per user turn: all that comes before as context, the assistant's answers to it trained.

    For templates that drop the reasoning of earlier turns (Qwen3, DeepSeek, gpt-oss): each row's prompt is then exactly
    what the model sees at inference, and each answer keeps its reasoning.
    """
    starts = [i for i, message in enumerate(messages) if message.get("role") == "user"]
    if not starts:
        return [[dict(message) for message in messages]]
    bounds = [*starts[1:], len(messages)]
    rows = []
    # What stands before the first question (a greeting of the assistant) belongs to the first row.
    for begin, end in zip([0, *starts[1:]], bounds, strict=True):
        turn = [
            dict(message, train=False) if message.get("role") == "assistant" else dict(message)
            for message in messages[:begin]
        ]
        turn += [dict(message) for message in messages[begin:end]]
        if any(message.get("role") == "assistant" for message in messages[begin:end]):
            rows.append(turn)
    return rows


def _fitting(messages: Sequence[Mapping[str, Any]], size: Any, limit: int) -> list[list[Mapping[str, Any]]]:
    """Runs of whole user turns, greedily as many as fit, each behind the conversation's system messages."""
    head = []
    for message in messages:
        if message.get("role") not in ("system", "developer"):
            break
        head.append(message)
    body = messages[len(head) :]
    starts = [i for i, message in enumerate(body) if message.get("role") == "user"]
    bounds = [0, *starts[1:], len(body)] if starts else [0, len(body)]
    turns = [list(body[a:b]) for a, b in itertools.pairwise(bounds)]
    runs: list[list[Mapping[str, Any]]] = []
    current: list[Mapping[str, Any]] = []
    for turn in turns:
        if not any(message.get("role") == "assistant" for message in turn):
            continue  # a last question without an answer trains nothing
        if current and size([*head, *current, *turn]) <= limit:
            current = [*current, *turn]
            continue
        if current:
            runs.append([*head, *current])
        current = turn
    if current:
        runs.append([*head, *current])
    return runs


def _slice(labelled: Labelled, i: int) -> Labelled:
    a, b = labelled.offsets[i], labelled.offsets[i + 1]
    mine = labelled.span_rows == i
    return Labelled(
        labelled.ids[a:b],
        labelled.labels[a:b],
        np.array([0, b - a]),
        labelled.spans[mine] - a,
        labelled.span_rows[mine] * 0,
    )


def _concatenate(parts: Sequence[Labelled]) -> Labelled:
    tokens = np.cumsum([0, *(len(part.ids) for part in parts)])
    rows = np.cumsum([0, *(len(part.offsets) - 1 for part in parts)])
    return Labelled(
        np.concatenate([part.ids for part in parts]),
        np.concatenate([part.labels for part in parts]),
        np.concatenate([[0], *(part.offsets[1:] + shift for part, shift in zip(parts, tokens, strict=False))]),
        np.concatenate([part.spans + shift for part, shift in zip(parts, tokens, strict=False)]),
        np.concatenate([part.span_rows + shift for part, shift in zip(parts, rows, strict=False)]),
    )
