"""Where a turn ends: the stop marker that closes it, whatever the template prints after it."""

from __future__ import annotations

import itertools
import re

from hf_objectives.errors import TemplateError
from hf_objectives.labels.agreement import agreement, whole
from hf_objectives.labels.marks import mark, read_marks
from hf_objectives.labels.templates import Renderer


class TurnEnds:
    """Finds what closes the turns of conversations under one template.

    Args:
        render: the template with its tools and arguments.
        markers: pattern of control tokens in rendered text.
        eos_token: the tokenizer's EOS, the first choice among stop markers.
    """

    def __init__(self, render: Renderer, markers: re.Pattern[str], eos_token: str | None) -> None:
        self.render, self.markers, self.eos_token = render, markers, eos_token
        self._closes_itself: bool | None = None

    def tail(self, messages: list[dict], k: int, text: str, start: int, end: int, header: str) -> str:
        """What follows turn k's own text in the render, up to and with the stop marker.

        Args:
            messages: the conversation, whose render is `text`.
            k: the turn, of which `text[start:end]` is known: from where the prompt ends to the end of the last thing said.
            header: the template's generation prompt.
        """
        rest, following = text[end:], messages[k + 1 : k + 2]
        own = self._own_tail(messages[: k + 1], rest, last=not following)
        closed = self._template_closes_turns()
        next_marker = self._next_marker(rest, own)
        if (not following and self._speaks(own)) or (following and following[0]["role"] != "user" and not next_marker):
            # Some templates print the end of a conversation in another way: Apriel leaves a call open there, Command R+
            # repeats its instructions. What they print where the user goes on decides.
            asked = self._own_tail([*messages[: k + 1], {"role": "user", "content": "Hi"}], rest, last=False, turn=k)
            if len(asked) > len(own):
                own, closed = asked, True
            elif self._speaks(own[len(asked) :]):
                own, next_marker = asked, self._next_marker(rest, asked)
        stops = list(self.markers.finditer(own)) if closed else []
        openers = self._openers(text, start, header) if closed else set()
        closing = list(itertools.takewhile(lambda stop: stop.group() not in openers, stops))
        if not header:
            closing = closing or stops[:1]  # one token may separate all turns
        eos = next((stop for stop in stops if stop.group() == self.eos_token), None)
        if eos or closing:
            return own[: (eos or closing[-1]).end()]
        # What comes next closes the turn: GLM stops at the next role's marker, gpt-oss prints another stop once the
        # conversation goes on. Where turns have stops of their own, the start of another turn is none.
        if not stops and next_marker and next_marker.group() not in openers:
            return rest[: next_marker.end()]
        return own[: stops[0].start() if stops else None].rstrip()

    def _next_marker(self, rest: str, own: str) -> re.Match[str] | None:
        """The control token that follows `own`, a beginning of `rest`, with nothing but white space between."""
        body = len(own.rstrip())
        return self.markers.match(rest, body + len(rest[body:]) - len(rest[body:].lstrip()))

    def _speaks(self, tail: str) -> bool:
        """Whether a tail holds words after its first control token."""
        return re.search(r"\w", "".join(self.markers.split(tail)[1:])) is not None

    def _openers(self, text: str, start: int, header: str) -> set[str]:
        """Control tokens that open turns, and so close none: those that the conversation begins with, and the one that
        opens the generation prompt, which some templates print unasked after an answer."""
        openers, at = set(), 0
        for found in self.markers.finditer(text):
            if text[at : found.start()].strip():
                break
            openers.add(found.group())
            at = found.end()
        opening = [self.markers.match(header.lstrip())] if header else list(self.markers.finditer(text[:start]))[-1:]
        return openers | {found.group() for found in opening if found}

    def _own_tail(self, messages: list[dict], rest: str, *, last: bool, turn: int = -1) -> str:
        """What the template prints after a turn, the last of `messages` or the one named, whatever follows it."""
        turn %= len(messages)
        try:
            other = read_marks(self.render(mark(messages), generation_prompt=last))
        except TemplateError:
            return rest if last else ""
        end = other.end(turn)
        if end is None:
            return rest if last else ""
        return rest[: whole(self.markers, rest, agreement(rest, other.text[end:])[0])]

    def _template_closes_turns(self) -> bool:
        """Whether a turn ends with a marker of its own (ChatML) or only when the next role is named (GLM)."""
        if self._closes_itself is None:
            self._closes_itself = True
            for content in ("Hello", [{"type": "text", "text": "Hello"}]):
                user = {"role": "user", "content": content}
                try:
                    probe = read_marks(self.render(mark([user, {"role": "assistant", "content": content}])))
                except TemplateError:
                    continue
                end = probe.end(1)
                if end is not None:
                    self._closes_itself = probe.text[end:].strip() != ""
                    break
        return self._closes_itself
