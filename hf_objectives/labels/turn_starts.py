"""Where a turn starts: right after the generation prompt, whether the render of the conversation holds it all or in part."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

from hf_objectives.errors import TemplateError
from hf_objectives.labels.messages import REASONING_FIELDS, content_texts
from hf_objectives.labels.sentinels import Sentinels, agreement, common_prefix, mark, read_sentinels, whole
from hf_objectives.labels.templates import Renderer
from hf_objectives.labels.turns import Turn


@dataclass(frozen=True, slots=True)
class Start:
    """Where a turn starts.

    Attributes:
        place: position in the render.
        lead: characters between the start and the turn's text; None where the turn starts within its text.
        pending: how the rest of the prompt, which the render does not hold, may go on.
    """

    place: int
    lead: int | None
    pending: str

    def may_start_later(self, turn: Turn) -> bool:
        """Whether another turn of this kind begins as the rest of the prompt does, and so may start behind it."""
        return self.lead == 0 and turn.text[turn.begin : turn.begin + 1] in self.pending  # type: ignore[operator]


class TurnStarts:
    """Finds the starts of turns under one template, each from the prompt that the model would be given.

    Args:
        render: the template with its tools and arguments.
        markers: pattern of control tokens in rendered text.
    """

    def __init__(self, render: Renderer, markers: re.Pattern[str]) -> None:
        self.render, self.markers = render, markers

    def prompt(self, messages: list[dict], k: int) -> str | None:
        """What the model is given when it has to write message k; None where the template refuses an empty conversation.

        Raises:
            TemplateError: the template refuses the messages before k.
        """
        try:
            return self.render(messages[:k], generation_prompt=True)
        except TemplateError as error:
            if k == 0:  # the prompt is then looked for in another way
                return None
            error.turn = k
            raise

    def find(self, turn: Turn, prompt: str | None) -> Start:
        """Where a turn starts, by the first of three rules that says so.

        Args:
            turn: the turn.
            prompt: see `prompt`.

        Raises:
            TemplateError: no rule finds the prompt in the render.
        """
        place = self.after_prompt(turn.text, prompt)
        if place is not None:
            return Start(place, _lead(turn, place), "")
        generation = self._generation_prompt(turn, prompt).lstrip()
        after = self._after_texts(turn, prompt)
        place, matched = self.after_generation_prompt(turn, generation)
        if place is None:
            place = self.after_agreement(turn, after, prompted=bool(generation))
        if place is None:
            raise TemplateError(
                "cannot tell where this turn starts: the render of the conversation does not hold the generation prompt "
                f"{generation[-60:]!r} before it",
                turn=turn.k,
            )
        pending = generation[matched : matched + 1]
        if after is not None and after.startswith(turn.frame_before):
            pending += after[len(turn.frame_before) :][:1]
        return Start(place, _lead(turn, place), pending)

    def after_prompt(self, text: str, prompt: str | None) -> int | None:
        """First rule: the render begins with the prompt, and the turn starts where the prompt ends.

        prompt  <u>Hi</s><a>
        render  <u>Hi</s><a>Hello</s>
                            ^
        """
        if prompt is None or not text.startswith(prompt):
            return None
        return self._after_header(text, len(prompt))

    def after_generation_prompt(self, turn: Turn, generation: str) -> tuple[int | None, int]:
        """Second rule: the turn starts after the longest beginning of the generation prompt that stands before its text.

        Qwen3 prints earlier turns without reasoning, so that the render does not begin with the prompt. Here the prompt
        goes on with a tag that the render does not hold:

            generation prompt  <a><think>
            render             <u>2 + 2?</s><a>Four.</s><u>Why?</s>
                                               ^

        Returns:
            The start, None where nothing of it is there; and how much of the generation prompt that is.
        """
        window = turn.window if turn.before <= turn.first else ""
        for length in range(len(generation), 0, -1):
            at = window.find(generation[:length])
            if at >= 0:
                place = turn.before + at
                start = whole(self.markers, turn.text, place + length)
                # Also whole in the prompt's own text: `<th` of a `<think>` that the turn does not have is no part of it.
                start = min(start, place + whole(self.markers, generation, length))
                return (start, start - place) if start > place else (None, 0)
        return None, 0

    def after_agreement(self, turn: Turn, after: str | None, *, prompted: bool) -> int | None:
        """Third rule: the turn starts where what the prompt prints after the last text and what the render prints there
        part, white space aside.

        Mistral has no generation prompt, and its render holds the tools elsewhere than the prompt does:

            prompt  [INST]Hi[/INST]
            render  [TOOLS]...[/TOOLS][INST]Hi[/INST] Hello</s>
                                                     ^
        Args:
            turn: the turn.
            after: what the prompt prints after the last text of a message; None where that is not known.
            prompted: whether the template has a generation prompt here.

        Returns:
            The start; None where the two agree in nothing, or where more of the prompt may stand further on.
        """
        if after is None:
            return None
        window = turn.window if turn.before <= turn.first else ""
        own = max((text for text in _texts(turn.messages[turn.k]) if window.endswith(text)), key=len, default="")
        frame = window.removesuffix(own)
        in_after, in_frame = agreement(after, frame)
        in_after, in_frame = whole(self.markers, after, in_after), whole(self.markers, frame, in_frame)
        more, between = after[in_after:].strip(), frame[in_frame:].strip()
        expected = self.markers.search(more)
        if (expected and expected.group() in between) or not frame[:in_frame].strip():
            return None
        if prompted and more and between not in more:
            return None
        return self._after_header(turn.text, turn.before + in_frame)

    @cached_property
    def header(self) -> str:
        """The generation prompt after a plain question; empty where the template has none or refuses the question."""
        try:
            return self._probe_prompt()
        except TemplateError:
            return ""

    def _after_header(self, text: str, place: int) -> int:
        """`place`, behind a header that the generation prompt leaves out here (DiffusionGemma after a tool result) but that
        every other turn is given: it is the template's, not the model's."""
        header = self.header if self.markers.search(self.header) else ""
        return place + (len(header) if header and text.startswith(header, place) else 0)

    def _generation_prompt(self, turn: Turn, prompt: str | None) -> str:
        """What the prompt holds and the render of the same messages without a generation prompt does not."""
        if prompt is None:  # the conversation starts with the assistant: any other conversation has the same prompt
            return self._probe_prompt()
        bare = self.render(turn.messages[: turn.k])
        return prompt[whole(self.markers, prompt, common_prefix(prompt, bare)) :]

    def _probe_prompt(self) -> str:
        probe = [{"role": "user", "content": "Hi"}]
        prompt, bare = self.render(probe, generation_prompt=True), self.render(probe)
        return prompt[whole(self.markers, prompt, common_prefix(prompt, bare)) :]

    def _after_texts(self, turn: Turn, prompt: str | None) -> str | None:
        """What the prompt prints after the last text of a message."""
        if prompt is None or not turn.k:
            return None
        found: Sentinels = read_sentinels(self.render(mark(turn.messages[: turn.k]), generation_prompt=True))
        return prompt[found.last_end() :] if found.text == prompt and found.ends else None


def _lead(turn: Turn, place: int) -> int | None:
    return turn.begin - place if turn.kind is not None and turn.before <= place <= turn.begin else None  # type: ignore[operator]


def _texts(message: dict) -> list[str]:
    """What a message says, piece by piece: content, reasoning, names of tools."""
    pieces = list(content_texts(message.get("content")))
    pieces += [message[field] for field in REASONING_FIELDS if message.get(field)]
    pieces += [call.get("function", call)["name"] for call in message.get("tool_calls") or ()]
    return [piece.strip() for piece in pieces]
