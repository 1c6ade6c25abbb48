"""Where in a rendered conversation the assistant's own output stands, for any chat template.

The loss mask starts right after the generation prompt, and ends with the stop marker that closes the turn. `turn_starts.py`
and `turn_ends.py` have the general rules, which render the conversation up to the turn. This file sees to it that they are
asked once for turns of one kind, not once a turn. Nothing here knows a template by name.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from itertools import accumulate, chain

from hf_objectives.errors import TemplateError
from hf_objectives.labels.message_forms import Form
from hf_objectives.labels.messages import Quiet
from hf_objectives.labels.sentinels import Sentinels, mark, read_sentinels
from hf_objectives.labels.steadiness import steadiness
from hf_objectives.labels.templates import Renderer
from hf_objectives.labels.text_use import searched_strings
from hf_objectives.labels.turn_ends import TurnEnds
from hf_objectives.labels.turn_starts import TurnStarts
from hf_objectives.labels.turns import Turn, read_turns

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as text, with the character spans that are trained, in order and apart."""

    text: str
    spans: list[Span]


@dataclass(frozen=True, slots=True)
class Layout:
    """How a template prints plain conversations with certain roles: fixed text, with the messages' texts in between.

    Attributes:
        fixed: the text before, between and after the messages' texts, one piece more than messages.
        turns: for each message, its span as (piece, place in it) of the begin and of the end; None where there is none.
        pending: for each message, the characters with which a text that may start later begins.
    """

    fixed: list[str]
    turns: list[tuple[int, int, int, int] | None]
    pending: list[str]

    def fill(self, texts: list[str], trained: Sequence[int]) -> Rendered | None:
        """The render of a conversation, and the spans of its turns `trained`; None where a turn may start later."""
        if any(self.pending[k] and texts[k][0] in self.pending[k] for k in trained):
            return None
        pieces = [*chain.from_iterable(zip(self.fixed, texts, strict=False)), self.fixed[-1]]
        places = [0, *accumulate(map(len, pieces))]
        spans = []
        for k in trained:
            piece, begin, last, end = self.turns[k]  # type: ignore[misc]
            spans.append((places[2 * piece] + begin, places[2 * last] + end))
        return Rendered("".join(pieces), spans)


@dataclass(frozen=True, slots=True)
class Frame:
    """Where turns of one kind start and end in their frames: `lead` stands between the start and the turn's text, `rest`
    behind its stop marker; a turn whose text begins with a character of `pending` may start later."""

    lead: str
    rest: str
    pending: str


@dataclass
class Memory:
    """What was learnt of a template, with or without tools: kept from conversation to conversation."""

    layouts: dict[tuple, Layout | None] = field(default_factory=dict)
    frames: dict[Hashable, Frame] = field(default_factory=dict)


# A text that is printed in another way by whatever quotes or changes texts: quotes, a backslash, both cases, an accent.
_PROBE = "Aa \"\\\n'\u00e9{}."
_MOST_LAYOUTS, _MOST_FRAMES = 1024, 65536


class SpanFinder:
    """Finds the trained spans of conversations under one template.

    Args:
        render: the template with its tools and arguments.
        markers: pattern of control tokens in rendered text.
        eos_token: the tokenizer's EOS, the first choice among stop markers.
        memory: what was learnt before with this template and arguments; with tools if `render` has tools, else without.
    """

    def __init__(self, render: Renderer, markers: re.Pattern[str], eos_token: str | None, memory: Memory) -> None:
        self.render, self.memory = render, memory
        self.starts = TurnStarts(render, markers)
        self.ends = TurnEnds(render, markers, eos_token, self.starts)
        self.searched = searched_pattern(render.source)
        self.steadiness = steadiness(render.source)

    def find(self, messages: list[dict], trained: Sequence[int]) -> Rendered:
        """Render a conversation and find the span of each trained assistant turn.

        Raises:
            TemplateError: the template refuses the conversation, drops a turn or a tool call, or its output does not
                determine a span; names the turn.
        """
        return self._find(messages, trained)[0]

    def _find(self, messages: list[dict], trained: Sequence[int]) -> tuple[Rendered, Sentinels, dict[int, str]]:
        """The spans, where the messages stand, and the characters with which turns that may start later begin."""
        text = self.render(messages)
        found = self._sentinels(messages, text)
        _check_printed(messages, trained, found)
        spans: list[Span] = []
        pending: dict[int, str] = {}
        for turn in read_turns(messages, trained, found, self.searched, distinct=self.steadiness.compares):
            span, pending[turn.k] = self._known(turn) or self._learn(turn)
            if spans and span[0] < spans[-1][1]:
                raise TemplateError("the template renders two assistant turns over each other", turn=turn.k)
            spans.append(span)
        return Rendered(text, spans), found, pending

    def refused_turn(self, messages: list[dict]) -> int:
        """The last message of the shortest beginning of a conversation that the template refuses."""
        for n in range(1, len(messages)):
            try:
                self.render(messages[:n])
            except TemplateError:
                return n - 1
        return len(messages) - 1

    # -- plain conversations -----------------------------------------------------------------------------------------

    def layout(self, roles: tuple[str, ...], form: Form, quiet: Quiet, dates: tuple[str, ...] = ()) -> Layout | None:
        """How the template prints a plain conversation with these roles, None where that depends on more than the roles.

        Args:
            roles: the role of each message.
            form: how messages are written, one of FORMS.
            quiet: passes texts that the template prints as they are.
            dates: the formats in which the template prints the date.
        """
        key = roles, form, tuple(map(datetime.now().strftime, dates)) if dates else ()
        if key not in self.memory.layouts:
            if len(self.memory.layouts) >= _MOST_LAYOUTS:
                self.memory.layouts.clear()
            self.memory.layouts[key] = self._read_layout(roles, form, quiet)
        return self.memory.layouts[key]

    def _read_layout(self, roles: tuple[str, ...], form: Form, quiet: Quiet) -> Layout | None:
        texts = [_PROBE.format(i) for i in range(len(roles))]
        messages = form([{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)])
        if messages is None or not all(map(quiet.passes, texts)):
            return None
        trained = [i for i, role in enumerate(roles) if role == "assistant"]
        try:
            rendered, found, pending = self._find(messages, trained)
        except TemplateError:  # told of the conversation itself
            return None
        begins, place = [], 0
        for i, text in enumerate(texts):
            begin = found.begins.get(i, -1)
            if begin < place or found.ends[i] != [begin + len(text)] or not found.text.startswith(text, begin):
                return None
            begins.append(begin)
            place = begin + len(text)
        bounds = [0, *(at for begin, text in zip(begins, texts, strict=True) for at in (begin, begin + len(text)))]
        pieces = list(zip(bounds[::2], [*begins, len(found.text)], strict=True))
        turns: list[tuple[int, int, int, int] | None] = [None] * len(roles)
        for k, span in zip(trained, rendered.spans, strict=True):
            places = [
                next(((n, at - begin) for n, (begin, end) in enumerate(pieces) if begin <= at <= end), None)
                for at in span
            ]
            if None in places:
                return None
            turns[k] = (*places[0], *places[1])  # type: ignore[misc]
        fixed = [found.text[begin:end] for begin, end in pieces]
        return Layout(fixed, turns, [pending.get(i, "") for i in range(len(roles))])

    # -- one turn ----------------------------------------------------------------------------------------------------

    def _known(self, turn: Turn) -> tuple[Span, str] | None:
        """The span of a turn of a known kind, None where its render is not that of the kind; and `Start.pending`."""
        frame = self.memory.frames.get(turn.key)
        if frame is None or turn.begin is None:
            return None
        if not turn.frame_before.endswith(frame.lead) or not turn.frame_after.endswith(frame.rest):
            return None
        if frame.pending and not frame.lead and turn.text[turn.begin : turn.begin + 1] in frame.pending:
            return None
        span = turn.begin - len(frame.lead), turn.end + len(turn.frame_after) - len(frame.rest)
        return span, "" if frame.lead else frame.pending

    def _learn(self, turn: Turn) -> tuple[Span, str]:
        """As `_known` by the general rules; kept for turns of its kind where it depends on nothing else."""
        start = self.starts.find(turn)
        if not start.place < turn.end:
            raise TemplateError("the template's generation prompt overlaps the text of this turn", turn=turn.k)
        tail = self.ends.find(turn, start.place)
        if (
            turn.key is not None
            and self.steadiness.steady
            and start.lasting
            and turn.before <= start.place <= turn.begin  # type: ignore[operator]
            and (turn.following is None or tail.reach <= len(turn.frame_after))
            and len(self.memory.frames) < _MOST_FRAMES
        ):
            lead, rest = turn.text[start.place : turn.begin], turn.frame_after[tail.length :]
            self.memory.frames[turn.key] = Frame(lead, rest, start.pending)
        return (start.place, turn.end + tail.length), "" if turn.begin != start.place else start.pending

    def _sentinels(self, messages: list[dict], text: str) -> Sentinels:
        found = read_sentinels(self.render(mark(messages, begins=True)))
        if found.text == text:
            return found
        # A template may look at the edges of a text (`content.endswith("/nothink")`): the sentinels of such messages are
        # left out, by halves.
        ends: dict[int, list[int]] = {}
        begins: dict[int, int] = {}
        calls: dict[int, set[int]] = {}
        parts = [range(len(messages))]
        while parts:
            part = parts.pop()
            for with_begins in (True, False):
                try:
                    found = read_sentinels(self.render(mark(messages, part, begins=with_begins)))
                except TemplateError:
                    continue
                if found.text == text:
                    ends |= found.ends
                    begins |= found.begins
                    calls |= found.calls
                    break
            else:
                if len(part) > 1:
                    middle = len(part) // 2
                    parts += [part[:middle], part[middle:]]
                elif messages[part[0]]["role"] == "assistant":
                    raise TemplateError(
                        "the template rewrites this turn depending on its text; its span is unknown", turn=part[0]
                    )
        return Sentinels(text, ends, begins, calls)


def _check_printed(messages: list[dict], trained: Sequence[int], found: Sentinels) -> None:
    """Check that the template prints each turn `trained`, with its tool calls and in one place.

    Raises:
        TemplateError: names the turn.
    """
    blocks = [i for i, message in enumerate(messages) if isinstance(message.get("content"), list)]
    for i in blocks:
        if i not in found.ends and any(block["text"].strip() for block in messages[i]["content"]):
            raise TemplateError("the chat template does not print the text blocks of this message", turn=i)
    if blocks and "[{'type': 'text'" in found.text:
        raise TemplateError("the chat template prints text blocks as Python writes a list", turn=blocks[0])
    places = sorted((place, i) for i, ends in found.ends.items() for place in ends)
    index = {place: n for n, place in enumerate(places)}
    for k in trained:
        if k not in found.ends:
            raise TemplateError("the chat template drops this assistant turn", turn=k)
        calls, shown = messages[k].get("tool_calls") or (), len(found.calls.get(k, ()))
        if shown < len(calls):
            raise TemplateError(
                f"the chat template renders {shown} of the {len(calls)} tool calls of this turn", turn=k
            )
        for call in calls:
            arguments = call.get("function", call).get("arguments")
            if isinstance(arguments, str) and arguments.strip() not in found.text:
                raise TemplateError("the chat template quotes the arguments of a tool call as a string", turn=k)
        first, last = found.ends[k][0], found.ends[k][-1]
        for place, other in places[index[first, k] : index[last, k]]:
            if other != k and first < place < last:
                raise TemplateError(f"the chat template prints message {other} inside this turn", turn=k)


@lru_cache(maxsize=64)
def searched_pattern(template: str) -> re.Pattern[str] | None:
    """A pattern of the strings that a template may look for in texts, upper case or lower; None for none."""
    strings = sorted(
        searched_strings(template) | steadiness(template).compared, key=lambda string: (-len(string), string)
    )
    return re.compile("|".join(map(re.escape, strings)), re.IGNORECASE) if strings else None
