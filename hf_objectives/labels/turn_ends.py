"""Where a turn ends: the stop marker that closes it, whatever the template prints after it."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from hf_objectives.errors import TemplateError
from hf_objectives.labels.sentinels import agreement, mark, read_sentinels, whole
from hf_objectives.labels.templates import Renderer
from hf_objectives.labels.turn_starts import TurnStarts
from hf_objectives.labels.turns import Turn


@dataclass(frozen=True, slots=True)
class Tail:
    """What closes a turn: its length, and how far behind the turn's text it was looked for."""

    length: int
    reach: int


class TurnEnds:
    """Finds what closes the turns of conversations under one template.

    Args:
        render: the template with its tools and arguments.
        markers: pattern of control tokens in rendered text.
        eos_token: the tokenizer's EOS, the first choice among stop markers.
        starts: knows the template's generation prompt.
    """

    def __init__(self, render: Renderer, markers: re.Pattern[str], eos_token: str | None, starts: TurnStarts) -> None:
        self.render, self.markers, self.eos_token, self.starts = render, markers, eos_token, starts

    def find(self, turn: Turn, start: int) -> Tail:
        """What follows a turn's own text in the render, up to and with the stop marker; the turn starts at `start`.

        The stop is the last control token, before one that opens a turn, of what the template prints after the turn
        whether or not something follows. Where turns have no stop of their own (GLM), the next role's marker is the stop.

            render               <u>Hi</s><a>Hello</s><u>Bye</s>
            without what follows <u>Hi</s><a>Hello</s>
                                                  ^^^^ the tail
        """
        rest, following = turn.text[turn.end :], turn.following
        messages = turn.messages[: turn.k + 1]
        own = self._own_tail(messages, rest, last=following is None)
        closed = self._template_closes_turns
        next_marker, reach = self._next_marker(rest, own)
        if (following is None and self._speaks(own)) or (following not in (None, "user") and not next_marker):
            # Some templates print the end of a conversation in another way: Apriel leaves a call open there, Command R+
            # repeats its instructions. What they print where the user goes on decides.
            asked = self._own_tail([*messages, {"role": "user", "content": "Hi"}], rest, last=False, turn=turn.k)
            reach = max(reach, len(asked))
            if len(asked) > len(own):
                own, closed = asked, True
            elif self._speaks(own[len(asked) :]):
                own, (next_marker, reached) = asked, self._next_marker(rest, asked)
                reach = max(reach, reached)
        return Tail(self._stop(turn, start, own, next_marker, closed), reach)

    def _stop(self, turn: Turn, start: int, own: str, next_marker: re.Match[str] | None, closed: bool) -> int:
        stops = list(self.markers.finditer(own)) if closed else []
        openers = self._openers(turn, start) if closed else set()
        closing = list(itertools.takewhile(lambda stop: stop.group() not in openers - {self._closer}, stops))
        if self._closer in openers:
            # The conversation begins with an empty turn: what stands behind its stop opens the next.
            ends = (n for n, stop in enumerate(closing, 1) if stop.group() == self._closer)
            closing = closing[: next(ends, None)]
        if not self.starts.header:
            closing = closing or stops[:1]  # one token may separate all turns
        eos = next((stop for stop in stops if stop.group() == self.eos_token), None)
        if eos or closing:
            return (eos or closing[-1]).end()
        # What comes next closes the turn: GLM stops at the next role's marker, gpt-oss prints another stop once the
        # conversation goes on. Where turns have stops of their own, the start of another turn is none.
        if not stops and next_marker and next_marker.group() not in openers:
            return next_marker.end()
        return len(own[: stops[0].start() if stops else None].rstrip())

    def _next_marker(self, rest: str, own: str) -> tuple[re.Match[str] | None, int]:
        """The control token that follows `own`, a beginning of `rest`, with nothing but white space between; and how much
        of `rest` says so."""
        body = len(own.rstrip())
        place = body + len(rest[body:]) - len(rest[body:].lstrip())
        found = self.markers.match(rest, place)
        return found, max(len(own), found.end() if found else place + 1)

    def _speaks(self, tail: str) -> bool:
        """Whether a tail holds words after its first control token."""
        return re.search(r"\w", "".join(self.markers.split(tail)[1:])) is not None

    def _openers(self, turn: Turn, start: int) -> set[str]:
        """Control tokens that open turns, and so close none: those that the conversation begins with, and the one that
        opens the generation prompt, which some templates print unasked after an answer."""
        openers, place = set(), 0
        for found in self.markers.finditer(turn.text, 0, turn.head):
            if turn.text[place : found.start()].strip():
                break
            openers.add(found.group())
            place = found.end()
        opening: Sequence[re.Match[str] | None] = [self.markers.match(self.starts.header.lstrip())]
        if not self.starts.header:
            opening = list(self.markers.finditer(turn.text, 0, start))[-1:]
        return openers | {found.group() for found in opening if found}

    def _own_tail(self, messages: list[dict], rest: str, *, last: bool, turn: int = -1) -> str:
        """What the template prints after a turn, the last of `messages` or the one named, whatever follows it."""
        turn %= len(messages)
        try:
            other = read_sentinels(self.render(mark(messages), generation_prompt=last))
        except TemplateError:
            return rest if last else ""
        end = other.end(turn)
        if end is None:
            return rest if last else ""
        return rest[: whole(self.markers, rest, agreement(rest, other.text[end:])[0])]

    @cached_property
    def _template_closes_turns(self) -> bool:
        """Whether a turn ends with a marker of its own (ChatML) or only when the next role is named (GLM)."""
        return not self.tails or self.tails[0].strip() != ""

    @cached_property
    def _closer(self) -> str | None:
        """The control token that the template prints right after every answer, whatever follows; None where there is none,
        or where it begins the generation prompt, which some templates print unasked."""
        first = [self.markers.match(tail.lstrip()) for tail in self.tails]
        tokens = {found.group() if found else None for found in first}
        header = self.markers.match(self.starts.header.lstrip())
        return tokens.pop() if len(tokens) == 1 and not (header and header.group() in tokens) else None

    @cached_property
    def tails(self) -> list[str]:
        """What the template prints after a short answer, the last message and before another question."""
        for content in ("Hello", [{"type": "text", "text": "Hello"}]):
            user, answer = ({"role": role, "content": content} for role in ("user", "assistant"))
            tails = []
            for exchange in ([user, answer], [user, answer, user]):
                try:
                    probe = read_sentinels(self.render(mark(exchange)))
                except TemplateError:
                    continue
                if (end := probe.end(1)) is not None:
                    tails.append(probe.text[end:])
            if tails:
                return tails
        return []
