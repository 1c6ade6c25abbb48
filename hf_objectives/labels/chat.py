"""Conversations to token ids and generation-exact labels, under any chat template.

A token is trained if and only if the model would have to produce it at inference: from the end of the generation
prompt to the stop marker of the turn, that marker included. `spans.py` finds these spans in the rendered text, this
file turns them into labels.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal

import pyarrow as pa

from hf_objectives.errors import ConversationError, DataError, FormatError, NothingSupervisedError, TemplateError
from hf_objectives.labels.config import CONTROL_TOKENS, TRAIN_ON, TrainOn
from hf_objectives.labels.formats import drop_nulls
from hf_objectives.labels.labelled import Labelled, cut, label_spans
from hf_objectives.labels.message_forms import FORMS, Form, as_given
from hf_objectives.labels.messages import ControlTokens, defuse, read_messages
from hf_objectives.labels.spans import Memory, Rendered, SpanFinder
from hf_objectives.labels.templates import Renderer, marker_pattern, surroundings, template_of, tool_schema
from hf_objectives.labels.templates import control_tokens as control_tokens_of
from hf_objectives.labels.tokenization import text_encoder
from hf_objectives.types import IGNORE_INDEX, check_max_length, check_one_of, parse_json


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
        check_one_of("train_on", train_on, TRAIN_ON)
        check_one_of("control_tokens", control_tokens, CONTROL_TOKENS)
        self.tokenizer, self.train_on, self.control_tokens = tokenizer, train_on, control_tokens
        self._chat_template, self._kwargs = chat_template, dict(template_kwargs or {})
        self._templates: dict[str, _Template] = {}
        self._form: Form = as_given
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
        source = template_of(self.tokenizer, self._chat_template, tools)
        template = self._templates.get(source)
        if template is None:
            template = self._templates[source] = _Template(self.tokenizer, source, self._kwargs)
        untrusted, structural = template.guards if self.control_tokens == "plain" else (None, None)
        cleaned = defuse(turns.messages, untrusted, structural)
        if untrusted is not None and tools is not None:
            tools = untrusted.wrap_all(tools)
        rendered = self._formed(template.finder(tools), cleaned, turns.trained)
        if self.train_on == "all":
            return Rendered(rendered.text, [(0, len(rendered.text))])
        return rendered

    def encode(self, rendered: Sequence[Rendered]) -> Labelled:
        """Tokenise rendered conversations, and label the tokens that lie in their spans."""
        encoded = text_encoder(self.tokenizer).encode_batch([row.text for row in rendered])
        return label_spans(encoded, rendered)

    def _formed(self, finder: SpanFinder, messages: list[dict], trained: Sequence[int]) -> Rendered:
        """Find the spans with the messages as they are, else in the first other form that the template takes."""
        first: TemplateError | None = None
        for form in dict.fromkeys((self._form, *FORMS)):
            formed = form(messages)
            if formed is None:
                continue
            try:
                rendered = finder.find(formed, trained)
            except TemplateError as error:
                first = first or error
                continue
            self._form = form
            return rendered
        assert first is not None  # `as_given` always applies
        if first.turn is None:
            first.turn = finder.refused_turn(messages)
        raise first


class _Template:
    """One template of a tokenizer, and what was learnt of it."""

    def __init__(self, tokenizer: Any, source: str, template_kwargs: Mapping[str, Any]) -> None:
        self.tokenizer, self.source = tokenizer, source
        self.markers = marker_pattern(tokenizer)
        self._renderer = Renderer(tokenizer, source, None, template_kwargs)
        self._memories = {False: Memory(), True: Memory()}
        self._without_tools = self._new_finder(self._renderer)

    def finder(self, tools: list | None) -> SpanFinder:
        """Finds spans of conversations with these tools."""
        return self._without_tools if tools is None else self._new_finder(self._renderer.with_tools(tools))

    def _new_finder(self, render: Renderer) -> SpanFinder:
        return SpanFinder(render, self.markers, self.tokenizer.eos_token, self._memories[bool(render.tools)])

    @cached_property
    def guards(self) -> tuple[ControlTokens, ControlTokens]:
        """Finders of forged control tokens: in text that the assistant did not write, and in the assistant's own."""
        every = control_tokens_of(self.tokenizer, self.source)
        special = {t.content for t in self.tokenizer.added_tokens_decoder.values() if t.special}
        outside, before_reply = surroundings(self._renderer)
        outside += "".join(map(str, (self.tokenizer.bos_token, self.tokenizer.eos_token)))
        # A pair of brackets that stands before replies alone, `<think>` and `</think>`, is the assistant's own markup.
        opens = [t for t in every if _partner(t) not in every or t in outside or _partner(t) in outside]
        structural = [t for t in opens if t in special and (t in outside or t in before_reply)]
        return ControlTokens(every), ControlTokens(structural)


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
            tools = parse_json(tools)
        except ValueError as error:
            raise ConversationError(f"tools is text but not JSON ({error}): {tools[:60]!r}") from error
    if not isinstance(tools, (list, tuple)):
        raise ConversationError(f"tools is {type(tools).__name__}; expected a list of JSON schemas")
    read = []
    for tool in tools:
        try:
            tool = parse_json(tool) if isinstance(tool, str) else tool
        except ValueError as error:
            raise ConversationError(f"a tool is text but not JSON ({error}): {tool[:60]!r}") from error
        if not isinstance(tool, Mapping) and not callable(tool):
            raise ConversationError(f"tool {tool!r:.80} is neither a JSON schema nor a function")
        read.append(drop_nulls(tool) if isinstance(tool, Mapping) else tool_schema(tool))
    return read or None


# The encoders used last, newest at the end. An encoder holds its tokenizer, so that a weak dictionary would never let go.
_recent: list[tuple[Any, tuple, ChatEncoder]] = []
_RECENT_KEPT = 8


def chat_encoder(tokenizer: Any, **settings: Any) -> ChatEncoder:
    """A ChatEncoder for a tokenizer and settings, with what it has learnt of the template; see `ChatEncoder`."""
    own, kwargs = getattr(tokenizer, "chat_template", None), settings.get("template_kwargs")
    key = (
        settings.get("chat_template") or (own if isinstance(own, str) else repr(own)),
        settings.get("train_on"),
        settings.get("control_tokens"),
        json.dumps(kwargs, sort_keys=True, default=repr) if kwargs else "",
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
    check_max_length(max_length)
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
    check_max_length(max_length)
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
        except DataError as error:
            raise error.at(source=source, row=row) from None
    try:
        labelled = encoder.encode(rendered)
    except FormatError:
        for row, one in enumerate(rendered):  # which of them is it
            try:
                text_encoder(tokenizer).check(one.text)
            except FormatError as error:
                raise error.at(source=source, row=row) from None
        raise
    if max_length is not None:
        labelled = cut(labelled, max_length)
    return labelled.to_table()
