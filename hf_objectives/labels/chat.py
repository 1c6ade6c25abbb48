"""Conversations to token ids and generation-exact labels, under any chat template.

A token is trained if and only if the model would have to produce it at inference: from the end of the generation
prompt to the stop marker of the turn, that marker included. `spans.py` finds these spans in the rendered text, this
file turns them into labels.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hf_objectives.errors import (
    ConfigError,
    ConversationError,
    DataError,
    NothingSupervisedError,
    TemplateError,
    nearest,
)
from hf_objectives.labels.config import CONTROL_TOKENS, TRAIN_ON, TrainOn
from hf_objectives.labels.formats import drop_nulls
from hf_objectives.labels.messages import CLOSE, OPEN, RESERVED, ControlTokens, defuse, read_messages
from hf_objectives.labels.spans import Rendered, SpanFinder
from hf_objectives.labels.styles import STYLES
from hf_objectives.labels.templates import Renderer, marker_pattern, template_of
from hf_objectives.labels.templates import control_tokens as control_tokens_of
from hf_objectives.labels.tokenization import Encoded, text_encoder
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


class ChatEncoder:
    """Encodes conversations under one tokenizer, template and policy; what it learns of the template is kept.

    Args:
        tokenizer: a fast transformers tokenizer.
        chat_template: template text or name, None for the tokenizer's own.
        train_on: "assistant" trains every assistant turn, "last_assistant" the last, "all" every token.
        control_tokens: "plain" reads control tokens inside user, system and tool text as plain text; "allow" encodes
            the render as it is.
        template_kwargs: passed to the template.

    Raises:
        ConfigError: an unknown `train_on` or `control_tokens`.
        TemplateError: no chat template.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        chat_template: str | None = None,
        train_on: str = "assistant",
        control_tokens: str = "plain",
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        for name, value, known in (
            ("train_on", train_on, TRAIN_ON),
            ("control_tokens", control_tokens, CONTROL_TOKENS),
        ):
            if value not in known:
                raise ConfigError(
                    f"{name} is {value!r}; expected one of {', '.join(known)}{nearest(str(value), known)}"
                )
        self.tokenizer, self.train_on, self.control_tokens = tokenizer, train_on, control_tokens
        self._template, self._kwargs = chat_template, dict(template_kwargs or {})
        self._finders: dict[tuple[str, bool], SpanFinder] = {}
        self._guards: dict[str, tuple[ControlTokens, ControlTokens]] = {}
        self._style = 0
        template_of(tokenizer, chat_template, None)

    def render(self, messages: Any, tools: Any = None, *, require_trained: bool = True) -> Rendered:
        """The text of a conversation and the character spans in it that are trained.

        Without `require_trained`, a conversation in which nothing is trained has no spans and is no error.

        Raises:
            ConversationError, VisionContentError, TemplateError: see `encode_chat`.
        """
        turns = read_messages(messages, train_on=self.train_on)
        if not turns.trained and require_trained:
            raise NothingSupervisedError("no assistant message to train; nothing would be supervised")
        tools = read_tools(tools)
        template = template_of(self.tokenizer, self._template, tools)
        cleaned = turns.messages
        self._refuse_reserved(cleaned)
        if self.control_tokens == "plain":
            untrusted, structural = self._guard(template)
            cleaned = defuse(cleaned, untrusted, structural) or cleaned
            tools = untrusted.wrap_all(tools) if tools is not None else None
        finder = self._finder(template, tools)
        if turns.plain and self._style == 0:
            try:
                rendered = finder.find(cleaned, turns.trained)
            except TemplateError as error:
                rendered = self._restyled(finder, cleaned, turns.trained, error)
        else:
            rendered = self._restyled(finder, cleaned, turns.trained, None)
        if self.train_on == "all":
            return Rendered(rendered.text, [(0, len(rendered.text))])
        return rendered

    def encode(self, rendered: Sequence[Rendered]) -> Labelled:
        """Tokenise rendered conversations, and label the tokens that lie in their spans."""
        encoded = text_encoder(self.tokenizer).encode_batch([one.text for one in rendered])
        return label_spans(encoded, rendered)

    def _restyled(
        self, finder: SpanFinder, messages: list[dict], trained: list[int], error: TemplateError | None
    ) -> Rendered:
        """Find the spans with the messages as they are, else in the first other form that the template takes."""
        first = error
        order = [self._style, *(i for i in range(len(STYLES)) if i != self._style)]
        for i in order:
            if error is not None and i == 0:
                continue
            styled = STYLES[i](messages)
            if styled is None:
                continue
            try:
                rendered = finder.find(styled, trained)
            except TemplateError as failed:
                first = first or failed
                continue
            self._style = i
            return rendered
        assert first is not None  # STYLES[0] always applies
        raise first

    def _finder(self, template: str, tools: list | None) -> SpanFinder:
        key = template, bool(tools)
        finder = self._finders.get(key)
        if finder is None:
            render = Renderer(self.tokenizer, template, None, self._kwargs)
            finder = SpanFinder(render, marker_pattern(self.tokenizer), self.tokenizer.eos_token)
            self._finders[key] = finder
        finder.render.tools = tools
        return finder

    def _guard(self, template: str) -> tuple[ControlTokens, ControlTokens]:
        """Finders of forged control tokens: in text that the assistant did not write, and in the assistant's own."""
        if template not in self._guards:
            every = control_tokens_of(self.tokenizer, template)
            special = {t.content for t in self.tokenizer.added_tokens_decoder.values() if t.special}
            finder = SpanFinder(
                Renderer(self.tokenizer, template, None, self._kwargs), marker_pattern(self.tokenizer), None
            )
            outside, before_reply = finder.framing()
            outside += "".join(map(str, (self.tokenizer.bos_token, self.tokenizer.eos_token)))
            # A pair of brackets that stands before replies alone, `<think>` and `</think>`, is the assistant's own markup.
            opens = [t for t in every if _partner(t) not in every or t in outside or _partner(t) in outside]
            structural = [t for t in opens if t in special and (t in outside or t in before_reply)]
            self._guards[template] = ControlTokens(every), ControlTokens(structural)
        return self._guards[template]

    @staticmethod
    def _refuse_reserved(messages: list[dict]) -> None:
        for turn, message in enumerate(messages):
            content = message.get("content")
            text = content if type(content) is str else json.dumps(message, ensure_ascii=False, default=str)
            if not text.isascii() and (found := RESERVED.search(text)):
                raise ConversationError(
                    f"private-use character U+{ord(found.group()):X}, which this library uses as a mark", turn=turn
                )


def _partner(token: str) -> str:
    """`</think>` of `<think>`, and the other way round."""
    return token[0] + token[2:] if token[1:2] == "/" else f"{token[0]}/{token[1:]}"


def read_tools(tools: Any) -> list | None:
    """Tool schemas as a list: parsed from JSON text, without the null keys that an Arrow table gives every tool.

    Raises:
        ConversationError: not a list of schemas or functions, or text that is not JSON.
    """
    if tools is None or (isinstance(tools, (str, list)) and not tools):
        return None
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise ConversationError(f"tools is text but not JSON ({error}): {tools[:60]!r}") from error
    if not isinstance(tools, (list, tuple)):
        raise ConversationError(f"tools is {type(tools).__name__}; expected a list of JSON schemas")
    read = []
    for tool in tools:
        tool = json.loads(tool) if isinstance(tool, str) else tool
        if not isinstance(tool, Mapping) and not callable(tool):
            raise ConversationError(f"tool {tool!r:.80} is neither a JSON schema nor a function")
        read.append(drop_nulls(tool) if isinstance(tool, Mapping) else tool)
    return read or None


def label_spans(encoded: Encoded, rendered: Sequence[Rendered]) -> Labelled:
    """Labels of encoded texts: a token is trained when it lies in a span.

    A token that begins before a span is not trained: the prompt supplies its beginning. One that ends after it is
    trained only where what follows the span is white space that the token swallows (`<|end|>` with `rstrip`).
    """
    sizes = np.diff(encoded.offsets)
    # One axis for all texts: text i begins at base[i], further on than any place in text i - 1.
    lengths = np.fromiter((4 * len(one.text) + 1 for one in rendered), np.int64, len(rendered))
    base = np.concatenate(([0], np.cumsum(lengths)[:-1])) if len(rendered) else np.empty(0, np.int64)
    shift = np.repeat(base, sizes)
    starts, ends = encoded.starts + shift, encoded.ends + shift
    bounds, rows = [], []
    for i, one in enumerate(rendered):
        for begin, end in one.spans:
            stretched = end
            while stretched < len(one.text) and one.text[stretched].isspace():
                stretched += 1
            bounds.append([_place(one.text, at, encoded.in_bytes[i]) + base[i] for at in (begin, end, stretched)])
            rows.append(i)
    places = np.asarray(bounds, dtype=np.int64).reshape(-1, 3)
    first = np.searchsorted(starts, places[:, 0], "left")
    last = np.minimum(np.searchsorted(ends, places[:, 2], "right"), np.searchsorted(starts, places[:, 1], "left"))
    steps = np.zeros(len(encoded.ids) + 1, np.int64)
    np.add.at(steps, first, 1)
    np.add.at(steps, np.maximum(first, last), -1)
    trained = np.cumsum(steps[:-1]) > 0
    labels = np.where(trained, encoded.ids, IGNORE_INDEX).astype(np.int32)
    spans = np.stack([first, np.maximum(first, last)], axis=1)
    return Labelled(encoded.ids, labels, encoded.offsets, spans, np.asarray(rows, np.int64))


def _place(text: str, at: int, in_bytes: bool) -> int:
    """Character position `at` of a text in the unit of its tokens' places."""
    if in_bytes:
        return at if text.isascii() else len(text[:at].encode())
    head = text[:at]
    return at - head.count(OPEN) - head.count(CLOSE)


# The encoders used last, newest at the end. An encoder holds its tokenizer, so that a weak dictionary would never let go.
_recent: list[tuple[Any, tuple, ChatEncoder]] = []
_RECENT_KEPT = 8


def chat_encoder(tokenizer: Any, **settings: Any) -> ChatEncoder:
    """A ChatEncoder for a tokenizer and settings, with what it has learnt of the template; see `ChatEncoder`."""
    key = (
        settings.get("chat_template") or repr(getattr(tokenizer, "chat_template", None)),
        settings.get("train_on"),
        settings.get("control_tokens"),
        json.dumps(settings.get("template_kwargs") or {}, sort_keys=True, default=repr),
        len(tokenizer),
        tokenizer.eos_token,
    )
    for i, (owner, known, encoder) in enumerate(_recent):
        if owner is tokenizer and known == key:
            _recent.append(_recent.pop(i))
            return encoder
    encoder = ChatEncoder(tokenizer, **settings)
    _recent.append((tokenizer, key, encoder))
    del _recent[:-_RECENT_KEPT]
    return encoder


def encode_chat(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence | None = None,
    chat_template: str | None = None,
    train_on: TrainOn = "assistant",
    max_length: int | None = None,
    control_tokens: Literal["plain", "allow"] = "plain",
    **template_kwargs: Any,
) -> dict[str, list[int]]:
    """Token ids and labels of one conversation.

    Args:
        tokenizer: a fast transformers tokenizer.
        messages: the conversation; an assistant message with `train: False` or `weight: 0` is not trained.
        tools: JSON schemas (or functions) of the tools that the template may show.
        chat_template: template to use in place of the tokenizer's own.
        train_on: "assistant": every assistant turn; "last_assistant": the last; "all": every token.
        max_length: ids beyond it are cut off, and a turn that the cut goes through is not trained at all.
        control_tokens: "plain": control tokens in user, system and tool text are read as plain text, and the assistant's
            text cannot forge those that open and close turns; "allow": the render is encoded as it is.
        template_kwargs: passed to the template, e.g. `enable_thinking=False`.

    Returns:
        `input_ids` and `labels`, two lists of int of the same length; labels are unshifted and -100 where a token is not
        trained. With `control_tokens="allow"`, or without control tokens in the texts, `input_ids` are those of
        `tokenizer.apply_chat_template(messages, tools=tools)`.

    Raises:
        ConversationError: no messages, an unknown role, empty or non-string content; names the turn.
        VisionContentError: image, video or audio content.
        TemplateError: no template, or one that fails on, drops or rewrites a turn so that its span is unknown.
        NothingSupervisedError: no token would be trained.
        ConfigError: an unknown setting, or `max_length` under 2.

    Example:
        >>> from hf_objectives import demo, encode_chat
        >>> row = encode_chat(demo.build_tokenizer(), [
        ...     {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}])
        >>> len(row["input_ids"]) == len(row["labels"])
        True
    """
    _check_max_length(max_length)
    encoder = chat_encoder(
        tokenizer,
        chat_template=chat_template,
        train_on=train_on,
        control_tokens=control_tokens,
        template_kwargs=template_kwargs,
    )
    labelled = encoder.encode([encoder.render(messages, tools)])
    row = (labelled if max_length is None else cut(labelled, max_length)).row(0)
    if all(label == IGNORE_INDEX for label in row["labels"]):
        raise NothingSupervisedError(
            f"no trained token is left within max_length={max_length}; the turns that the cut goes through are not trained"
        )
    return row


def encode_chats(
    tokenizer: Any,
    conversations: Iterable[Sequence[Mapping[str, Any]]],
    *,
    tools: Sequence[Sequence | None] | None = None,
    chat_template: str | None = None,
    train_on: TrainOn = "assistant",
    max_length: int | None = None,
    control_tokens: Literal["plain", "allow"] = "plain",
    source: str | None = None,
    **template_kwargs: Any,
) -> pa.Table:
    """`encode_chat` for a batch.

    Args:
        conversations: a list of conversations.
        tools: one list of tools (or None) per conversation.
        source: name of the data source, for errors.

    Returns:
        A table with one row per conversation and list columns `input_ids` and `labels` (int32).

    Raises:
        DataError: as `encode_chat`, naming the row too; a row that the cut leaves without trained tokens stays.
    """
    _check_max_length(max_length)
    encoder = chat_encoder(
        tokenizer,
        chat_template=chat_template,
        train_on=train_on,
        control_tokens=control_tokens,
        template_kwargs=template_kwargs,
    )
    rendered = []
    for row, messages in enumerate(conversations):
        try:
            rendered.append(encoder.render(messages, tools[row] if tools is not None else None))
            text_encoder(tokenizer).check(rendered[-1].text)
        except DataError as error:
            raise error.at(source=source, row=row) from None
    labelled = encoder.encode(rendered)
    if max_length is not None:
        labelled = cut(labelled, max_length)
    return labelled.to_table()


def _check_max_length(max_length: int | None) -> None:
    if max_length is not None and max_length < 2:
        raise ConfigError(f"max_length is {max_length}; expected at least 2, a token and the one that it predicts")


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
