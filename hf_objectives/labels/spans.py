"""Where in a rendered conversation the assistant's own output stands, for any chat template.

The loss mask starts right after the generation prompt, and ends with the stop marker that closes the turn. `turn_starts.py`
and `turn_ends.py` have the general rules, which render the conversation up to the turn. This file says how often they are
asked, so that the cost of a conversation is linear in its turns. Nothing here knows a template by name.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from hf_objectives.errors import TemplateError
from hf_objectives.labels.sentinels import Sentinels, mark, read_sentinels
from hf_objectives.labels.templates import Renderer, searched_strings
from hf_objectives.labels.turn_ends import TurnEnds
from hf_objectives.labels.turn_starts import Start, TurnStarts
from hf_objectives.labels.turns import Turn, read_turns

Span = tuple[int, int]

# The prompts of so many turns of a conversation are rendered; later those of turns 64, 256, 1024 ..., of the last and of the
# first of each kind, which show whether the template goes on as it began.
_EVERY_PROMPT = 16
_MOST_KINDS = 65536


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as text, with the character spans that are trained, in order and apart."""

    text: str
    spans: list[Span]


@dataclass
class Memory:
    """What is kept of a template, with or without tools, from conversation to conversation.

    Attributes:
        header: the generation prompt after a plain question; None before it was looked for.
        tails: what stands after a short answer; None before it was looked for.
        rests: for each kind of turn, what stands behind its stop marker.
        closings: for turns that are text alone, by the roles around them, how they are printed.
    """

    header: str | None = None
    tails: list[str] | None = None
    rests: dict[Hashable, str] = field(default_factory=dict)
    closings: dict[Hashable, Closing] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Closing:
    """How a turn is printed: `lead`, its text, `after`; the first `length` characters of `after` are trained."""

    lead: str
    after: str
    length: int


class SpanFinder:
    """Finds the trained spans of conversations under one template.

    Args:
        render: the template with its tools and arguments.
        markers: pattern of control tokens in rendered text.
        eos_token: the tokenizer's EOS, the first choice among stop markers.
        memory: what was kept of this template with these arguments; one if `render` has tools, another if it has none.
    """

    def __init__(self, render: Renderer, markers: re.Pattern[str], eos_token: str | None, memory: Memory) -> None:
        self.render, self.memory = render, memory
        self.starts = TurnStarts(render, markers)
        self.ends = TurnEnds(render, markers, eos_token, self.starts)
        if memory.header is None or memory.tails is None:
            memory.header, memory.tails = self.starts.header, self.ends.tails
        self.starts.header, self.ends.tails = memory.header, memory.tails
        self.searched = searched_strings(render.source)

    def find(self, messages: list[dict], trained: Sequence[int]) -> Rendered:
        """Render a conversation and find the span of each trained assistant turn.

        Raises:
            TemplateError: the template refuses the conversation, drops a turn or a tool call, or its output does not
                determine a span; names the turn.
        """
        text = self.render(messages)
        prompts: dict[int, str | None] = {}
        spans = self._printed_as_before(messages, trained, text, prompts)
        if spans is not None:
            return Rendered(text, spans)
        found = self._sentinels(messages, text)
        _check_printed(messages, trained, found)
        turns = read_turns(messages, trained, found, self.searched)
        spans = []
        for turn, start in zip(turns, self._starts(turns, prompts), strict=True):
            if spans and start < spans[-1][1]:
                raise TemplateError("the template renders two assistant turns over each other", turn=turn.k)
            spans.append((start, self._end(turn, start)))
        return Rendered(text, spans)

    def _printed_as_before(
        self, messages: list[dict], trained: Sequence[int], text: str, prompts: dict[int, str | None]
    ) -> list[Span] | None:
        """The spans of a conversation of texts, each right behind its prompt and closed as turns before it were.

        None where this does not hold for a turn. `prompts` gets the prompts that were rendered.
        """
        if len(trained) > _EVERY_PROMPT:
            return None
        roles = []
        for message in messages:
            if type(message.get("content")) is not str:
                return None
            roles.append(message["role"])
        spans: list[Span] = []
        for k in trained:
            closing = self.memory.closings.get(_roles_around(roles, k))
            if closing is None or len(messages[k]) > 2:
                return None
            prompts[k] = prompt = self.starts.prompt(messages, k)
            start = self.starts.after_prompt(text, prompt)
            if start is None or (spans and start < spans[-1][1]):
                return None
            said = messages[k]["content"]
            after = start + len(closing.lead) + len(said)
            if not text.startswith(closing.lead + said + closing.after, start):
                return None
            if k == len(messages) - 1 and len(text) > after + len(closing.after):
                return None
            spans.append((start, after + closing.length))
        return spans

    def refused_turn(self, messages: list[dict]) -> int:
        """The last message of the shortest beginning of a conversation that the template refuses."""
        for n in range(1, len(messages)):
            try:
                self.render(messages[:n])
            except TemplateError:
                return n - 1
        return len(messages) - 1

    def _starts(self, turns: list[Turn], prompts: dict[int, str | None]) -> list[int]:
        """Where each turn starts, by its own prompt, or in a long conversation as the turns of its kind before it.

        Where two turns of one kind start at different places in their frames, every prompt of the conversation is rendered.
        """

        def find(turn: Turn) -> Start:
            if turn.k not in prompts:
                prompts[turn.k] = self.starts.prompt(turn.messages, turn.k)
            return self.starts.find(turn, prompts[turn.k])

        kinds: dict[Hashable, Start] = {}
        starts = []
        for n, turn in enumerate(turns):
            known = kinds.get(turn.kind)
            sampled = n < _EVERY_PROMPT or _is_power_of_four(n) or turn is turns[-1]
            if known is not None and not sampled and not known.may_start_later(turn):
                starts.append(turn.begin - known.lead)  # type: ignore[operator]
                continue
            start = find(turn)
            if known is not None and known.lead != start.lead and not known.may_start_later(turn):
                return [find(turn).place for turn in turns]
            if start.lead is not None:
                kinds.setdefault(turn.kind, start)
            starts.append(start.place)
        return starts

    def _end(self, turn: Turn, start: int) -> int:
        """The end of a turn's stop marker, as it was found for turns of its kind in this or an earlier conversation."""
        if not start < turn.end:
            raise TemplateError("the template's generation prompt overlaps the text of this turn", turn=turn.k)
        rest = self.memory.rests.get(turn.frame_kind)
        if rest is not None and turn.frame_after.endswith(rest):
            return turn.end + len(turn.frame_after) - len(rest)
        tail = self.ends.find(turn, start)
        seen = turn.following is None or tail.reach <= len(turn.frame_after)  # else a later text was looked at
        if turn.frame_kind is not None and seen and len(self.memory.rests) < _MOST_KINDS:
            self.memory.rests[turn.frame_kind] = turn.frame_after[tail.length :]
            if start <= turn.begin:  # type: ignore[operator]
                after = turn.frame_after if turn.following is None else turn.frame_after[: tail.reach]
                self.memory.closings[_roles_around([m["role"] for m in turn.messages], turn.k)] = Closing(
                    turn.text[start : turn.begin], after, tail.length
                )
        return turn.end + tail.length

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


def _roles_around(roles: list[str], k: int) -> tuple[str | int, ...]:
    """The roles of the first message, of the two before message k and of the one behind it."""
    return (roles[0], min(k, 2), *roles[max(k - 2, 0) : k + 2])


def _is_power_of_four(n: int) -> bool:
    return n & (n - 1) == 0 and n.bit_length() % 2 == 1
