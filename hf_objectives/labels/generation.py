"""Write the loss mask of `encode_chat` into a chat template as `{% generation %}` tags, for trainers that read it there."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jinja2 import lexer

from hf_objectives.errors import HFObjectivesError, TemplateError
from hf_objectives.labels.chat import chat_encoder, encode_chat
from hf_objectives.labels.spans import Span
from hf_objectives.labels.templates import Renderer, compile_template, marker_pattern, template_of
from hf_objectives.types import IGNORE_INDEX

logger = logging.getLogger(__name__)

_CALL = {"type": "function", "function": {"name": "look_up", "arguments": {"word": "blue"}}}
_TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Look a word up.",
        "parameters": {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]},
    },
}
_ASKED = {"role": "user", "content": "Which colour has the sky?"}
_SAID = {"role": "assistant", "content": "It is blue."}
_GIVEN = {"role": "tool", "name": "look_up", "content": "a colour"}
_CHATS: list[list[dict[str, Any]]] = [
    [_ASKED, _SAID],
    [
        _ASKED,
        _SAID,
        {"role": "user", "content": "And grass?"},
        {"role": "assistant", "content": "Green,\n\nof course."},
    ],
    [{"role": "system", "content": "Be brief."}, _ASKED, _SAID],
    [_ASKED, {**_SAID, "content": "", "tool_calls": [_CALL]}, _GIVEN, _SAID],
    [_ASKED, {**_SAID, "content": "I look.", "tool_calls": [_CALL, _CALL]}, _GIVEN, _GIVEN, _SAID, _ASKED, _SAID],
]
#: Conversations, each with tools or none, that a template is tried on.
PROBES = [(chat, [_TOOL] if any("tool_calls" in turn for turn in chat) else None) for chat in _CHATS]
_MARK = "\ue000{}\ue001"  # of the private use area: no template prints it
_OPENING = frozenset("for if macro call filter set generation block with autoescape trans".split())
_WORDS = frozenset("if else and or not in is".split())


def generation_template(tokenizer: Any, *, probes: Sequence[tuple[list[dict], list | None]] = PROBES) -> str:
    """The tokenizer's chat template with `{% generation %}` tags around the tokens that `encode_chat` trains.

    TRL's `assistant_only_loss` calls `apply_chat_template(..., return_assistant_tokens_mask=True)`. With this template, that
    call returns the loss mask of `encode_chat`. The rendered text does not change.

    Args:
        tokenizer: a fast transformers tokenizer with a chat template.
        probes: conversations with their tools. Both masks are compared on each. A warning counts those that the template
            refuses. Give your own if they hold more than text, tool calls and a system prompt.

    Raises:
        TemplateError: no template; no position of the tags gives this mask; or the template refuses every conversation.

    Example:
        >>> from hf_objectives import demo
        >>> from hf_objectives.labels import generation_template
        >>> "{% generation %}" in generation_template(demo.build_tokenizer())
        True
    """
    source = template_of(tokenizer, None, None)
    pieces = list(_pieces(source, re.compile(f"({marker_pattern(tokenizer).pattern})")))
    tried = list(_tried(tokenizer, source, probes))
    if not tried:
        raise TemplateError("the chat template refuses every conversation that it was tried on")
    if len(tried) < len(probes):
        logger.warning(
            "the mask was compared on %d of %d conversations; the template refuses the others, or takes them in another form",
            *(len(tried), len(probes)),
        )
    wrapped: list[tuple[int, int]] = []
    for begin, end in _places(tokenizer, pieces, tried):
        if all(end <= other[0] or other[1] <= begin for other in wrapped):
            wrapped.append((begin, end))
    made = _wrapped(pieces, wrapped)
    for messages, tools, _, _ in tried:
        _check(tokenizer, made, messages, tools)
    return made


def _tried(tokenizer: Any, source: str, probes: Any) -> Iterator[tuple[list[dict], Any, str, list[Span]]]:
    encoder = chat_encoder(tokenizer)
    for messages, tools in probes:
        try:
            rendered = encoder.render(messages, tools)
            if Renderer(tokenizer, source, tools, {})(messages) != rendered.text:
                continue  # the form that it takes differs from what is given, arguments of calls as text for one
        except HFObjectivesError:
            continue
        yield messages, tools, rendered.text, rendered.spans


def _pieces(source: str, markers: re.Pattern[str]) -> Iterator[str]:
    """Split a template into text, output expressions and tags. Whitespace is trimmed by now, and each tag turns trimming off.

    Text is split at control tokens, and `{{ a + b }}` into one output for each operand. Existing `{% generation %}` tags are
    removed.
    """
    data, inside, kind = "", list[tuple[str, str]](), ""
    for _, token, value in compile_template(source).environment.lexer.tokeniter(source, None):
        match token:
            case lexer.TOKEN_DATA:
                data += value
            case lexer.TOKEN_RAW_BEGIN | lexer.TOKEN_RAW_END:
                raise TemplateError("the chat template has a raw block, which cannot be taken apart")
            case lexer.TOKEN_BLOCK_BEGIN | lexer.TOKEN_VARIABLE_BEGIN:
                yield from _texts(data, markers)
                data, inside, kind = "", [], token
            case lexer.TOKEN_BLOCK_END:
                words = "".join(text for _, text in inside).strip()
                if words.split()[0] not in ("generation", "endgeneration"):
                    yield f"{{%+ {words} +%}}"
                kind = ""
            case lexer.TOKEN_VARIABLE_END:
                yield from (f"{{{{ {part} }}}}" for part in _added(inside, markers))
                kind = ""
            case _ if kind:
                inside.append((token, value))
    yield from _texts(data, markers)


def _texts(data: str, markers: re.Pattern[str]) -> Iterator[str]:
    for text in filter(None, markers.split(data)):
        yield from filter(None, [text.removesuffix("{"), "{{ '{' }}" if text.endswith("{") else ""])  # a tag may follow


def _added(tokens: list[tuple[str, str]], markers: re.Pattern[str]) -> list[str]:
    """The parts of `a + b ~ c`, strings cut at control tokens; an expression of another form is one part."""
    parts, depth = [""], 0
    for token, value in tokens:
        if token == lexer.TOKEN_OPERATOR and depth == 0 and value in ("+", "~"):
            parts.append("")
            continue
        if token == lexer.TOKEN_STRING and depth == 0 and not parts[-1].strip():
            first, *rest = list(filter(None, markers.split(value[1:-1]))) or [""]
            parts[-1] = value[0] + first + value[0]
            parts += [value[0] + text + value[0] for text in rest]
            continue
        plain = token in (lexer.TOKEN_STRING, lexer.TOKEN_NAME, lexer.TOKEN_INTEGER, lexer.TOKEN_WHITESPACE)
        if depth == 0 and (value in _WORDS or not (plain or value in ".|([{)]}")):
            return ["".join(text for _, text in tokens).strip()]
        depth += (value in ("(", "[", "{")) - (value in (")", "]", "}"))
        parts[-1] += value
    return [part.strip() for part in parts]


def _tag(piece: str) -> str:
    """The first word of a tag; empty for text and outputs."""
    found = re.match(r"\{%\+ (\w+)", piece)
    return found[1] if found else ""


def _opens(piece: str) -> bool:
    tag = _tag(piece)
    return tag in _OPENING and not (tag == "set" and re.match(r"\{%\+ set [^=]*=", piece) is not None)


def _loop_variables(pieces: Sequence[str]) -> list[str]:
    """For each boundary of pieces, the variable of the innermost loop over turns around it; empty where there is none."""
    found, stack = [""], list[str]()
    for piece in pieces:
        if _opens(piece):
            loop = re.match(r"\{%\+ for (\w+) in ", piece)
            named = loop is not None and re.search(rf"\b{loop[1]}(\.role\b|\[['\"]role)", "".join(pieces))
            stack.append(loop[1] if loop and named else stack[-1] if stack else "")
        elif _tag(piece).startswith("end"):
            stack.pop()
        found.append(stack[-1] if stack else "")
    return found


def _balanced(pieces: Sequence[str]) -> bool:
    """Whether every tag that opens in a run of pieces closes there, and none closes or goes on what opened before."""
    depth = 0
    for piece in pieces:
        tag = _tag(piece)
        depth += _opens(piece) - tag.startswith("end")
        if depth < 0 or (depth == 0 and tag in ("else", "elif")):
            return False
    return depth == 0


def _places(tokenizer: Any, pieces: Sequence[str], tried: Sequence[Any]) -> list[tuple[int, int]]:
    """Runs of pieces whose output in assistant turns is trained text only, the longest output first."""
    variables = _loop_variables(pieces)
    held = [0]  # blocks around a boundary whose text the template may use again
    for piece in pieces:
        inner = _opens(piece) and _tag(piece) in ("macro", "set", "call", "filter")
        held.append(held[-1] + inner - (_tag(piece) in ("endmacro", "endset", "endcall", "endfilter")))
    marks = ["" if held[i] else _marked(i, variables[i]) for i in range(len(held))]
    marked = marks[0] + "".join(piece + mark for piece, mark in zip(pieces, marks[1:], strict=True))
    printed_by: dict[tuple[int, int], set[tuple[int, int, int]]] = defaultdict(set)
    refused: set[tuple[int, int]] = set()
    for probe, (messages, tools, text, spans) in enumerate(tried):
        printed = Renderer(tokenizer, marked, tools, {})(messages)
        events, plain = _events(printed)
        if plain != text:
            raise TemplateError("the chat template computes with what it prints, so that no mark can stand in it")
        for k, (begin, at, role) in enumerate(events):
            if role != "assistant":
                continue
            seen = {begin}
            for end, until, _ in events[k + 1 :]:
                if end == begin:  # the next turn
                    break
                if end > begin and end not in seen:
                    seen.add(end)
                    if any(first <= at < until <= last for first, last in spans):
                        printed_by[begin, end].add((probe, at, until))
                    elif until > at:
                        refused.add((begin, end))
    found = [place for place in printed_by if place not in refused and _balanced(pieces[slice(*place)])]
    sizes = {place: sum(until - at for _, at, until in printed_by[place]) for place in found}
    return sorted(found, key=lambda place: (-sizes[place], place[1] - place[0], place))


def _marked(i: int, variable: str) -> str:
    role = f"({variable}.role if {variable} is mapping else '')" if variable else "''"
    return f"{{{{ '{_MARK[0]}{i} ' ~ {role} ~ '{_MARK[-1]}' }}}}"


def _events(printed: str) -> tuple[list[tuple[int, int, str]], str]:
    """The boundaries that were passed, each with the place in the text and the role of the turn, and the text."""
    events, plain, position = [], "", 0
    for found in re.finditer(rf"{_MARK[0]}(\d+) ([^{_MARK[-1]}]*){_MARK[-1]}", printed):
        plain += printed[position : found.start()]
        events.append((int(found[1]), len(plain), found[2]))
        position = found.end()
    return events, plain + printed[position:]


def _wrapped(pieces: Sequence[str], places: Sequence[tuple[int, int]]) -> str:
    variables, made, position = _loop_variables(pieces), "", 0
    for begin, end in sorted(places):
        inner = "".join(pieces[begin:end])
        condition = f"{{%+ if {variables[begin]}.role == 'assistant' +%}}" if variables[begin] else ""
        # TRL looks for the tags in this form, in which they would trim what stands beside them.
        marked = f"{{{{ '' }}}}{{% generation %}}{{{{ '' }}}}{inner}{{{{ '' }}}}{{% endgeneration %}}{{{{ '' }}}}"
        both = f"{condition}{marked}{{%+ else +%}}{inner}{{%+ endif +%}}" if condition else marked
        made += "".join(pieces[position:begin]) + both
        position = end
    return made + "".join(pieces[position:])


def _check(tokenizer: Any, template: str, messages: list[dict], tools: Any) -> None:
    row = encode_chat(tokenizer, messages, tools=tools)
    try:
        made: Mapping[str, Any] = tokenizer.apply_chat_template(
            messages, tools=tools, chat_template=template, return_dict=True, return_assistant_tokens_mask=True
        )
    except Exception as error:  # of whatever the template computes
        raise TemplateError(f"the template fails with its marks: {type(error).__name__}: {error!s:.200}") from error
    wanted = [int(label != IGNORE_INDEX) for label in row["labels"]]
    if list(made["input_ids"]) != row["input_ids"] or list(made["assistant_masks"]) != wanted:
        roles = ", ".join(turn["role"] for turn in messages)
        raise TemplateError(
            f"no place for generation marks in the chat template gives the mask of a conversation of {roles}; encode rows "
            "with DataCollatorForAssistantOnlyLM or prepare_dataset, whose labels need no marks"
        )
