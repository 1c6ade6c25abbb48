"""Where in a rendered conversation the assistant's own output stands, for any chat template.

For the assistant message k, let P be the render of the messages before it with the generation prompt and R the render
of the whole conversation. The span starts where the part of P that R contains ends, and ends with the stop marker that
closes the turn. Nothing here knows a template by name, and nothing assumes that P is a prefix of R: reasoning
templates render earlier turns differently once later turns follow. Where P is no prefix, and for the ends of turns,
messages are marked with private code points before rendering and found again in the output.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from hf_objectives.errors import TemplateError
from hf_objectives.labels.agreement import agreement, common_prefix, whole
from hf_objectives.labels.marks import Marks, mark, read_marks
from hf_objectives.labels.messages import REASONING_FIELDS
from hf_objectives.labels.templates import Renderer, text_steers
from hf_objectives.labels.turn_ends import TurnEnds

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as text, with the character spans that are trained, in order and apart."""

    text: str
    spans: list[Span]


@dataclass(frozen=True, slots=True)
class Closing:
    """How a template frames the text of a turn: `lead` between prompt and text, `tail` from the text to the stop's end."""

    lead: str
    tail: str


class SpanFinder:
    """Finds the trained spans of conversations under one template; remembers how it frames each shape of turn.

    Args:
        render: the template with its tools and arguments.
        markers: pattern of control tokens in rendered text.
        eos_token: the tokenizer's EOS, the first choice among stop markers.
    """

    def __init__(self, render: Renderer, markers: re.Pattern[str], eos_token: str | None) -> None:
        self.render, self.markers = render, markers
        self.ends = TurnEnds(render, markers, eos_token)
        self._closings: dict[tuple, Closing] = {}
        self._opening: str | None = None
        self._blind = not text_steers(render.source)
        self._prompts: dict[tuple[str, ...], list[str] | None] = {}

    def find(self, messages: list[dict], trained: list[int]) -> Rendered:
        """Render a conversation and find the span of each trained assistant turn.

        Raises:
            TemplateError: the template refuses the conversation, drops a turn or a tool call, or its output does not
                determine a span; names the turn.
        """
        text = self._render_whole(messages)
        marks: Marks | None = None
        spans: list[Span] = []
        for k in trained:
            prompt = self._prompt(messages, k)
            start = self._after(text, prompt)
            span = self._framed(text, start, messages, k) if start is not None else None
            if span is None:
                if marks is None:
                    marks = self._marks(messages, text)
                    self._check_rendered(messages, trained, marks, text)
                span = self._located(messages, k, text, prompt, start, marks)
            if spans and span[0] < spans[-1][1]:
                raise TemplateError("the template renders two assistant turns over each other", turn=k)
            spans.append(span)
        return Rendered(text, spans)

    def framing(self) -> tuple[str, str]:
        """What the template prints around a short exchange, the source of the tokens that open and close turns: around the
        user's text and after a reply, and before a reply."""
        hello = "Hello, hello"
        for content in (hello, [{"type": "text", "text": hello}]):
            user, reply = ({"role": role, "content": content} for role in ("user", "assistant"))
            for exchange in ([user, reply, user], [user, reply], [user]):
                try:
                    around = self.render(exchange).split(hello)
                    prompt = self.render(exchange[:1], generation_prompt=True).split(hello)
                except TemplateError:
                    continue
                if len(around) != len(exchange) + 1 or len(prompt) != 2 or len(exchange) == 1:
                    return "".join(around + prompt), ""
                return "".join([around[0], *around[2:], prompt[0]]), around[1] + prompt[1]
        return "", ""

    # -- renders -------------------------------------------------------------------------------------------------

    def _render_whole(self, messages: list[dict]) -> str:
        try:
            return self.render(messages)
        except TemplateError as error:
            # The shortest prefix that the template refuses names the turn that it stumbles over.
            for n in range(1, len(messages)):
                try:
                    self.render(messages[:n])
                except TemplateError as earlier:
                    earlier.turn = n - 1
                    raise earlier from error
            error.turn = len(messages) - 1
            raise

    def _prompt(self, messages: list[dict], k: int) -> str | None:
        """The prompt of turn k.

        Where the template provably prints what messages say and does not look at it, the prompt's literal text depends
        on roles alone: it is learnt once, and filled with this conversation's contents.
        """
        if self._blind and k and not self.render.tools:
            contents = [m["content"] for m in messages[:k] if len(m) == 2 and isinstance(m["content"], str)]
            key = tuple(message["role"] for message in messages[:k])
            if len(contents) == k and not any(c[:1].isspace() or c[-1:].isspace() for c in contents):
                if key not in self._prompts:
                    self._prompts[key] = self._learn_prompt(messages[:k])
                literals = self._prompts[key]
                if literals is not None:
                    parts = [part for pair in zip(literals, contents, strict=False) for part in pair]
                    return "".join(parts) + literals[-1]
        try:
            return self.render(messages[:k], generation_prompt=True)
        except TemplateError as error:
            if k == 0:  # many templates refuse an empty conversation; the prompt is then looked for in another way
                return None
            error.turn = k
            raise

    def _learn_prompt(self, messages: list[dict]) -> list[str] | None:
        """The literal text before, between and after the contents of a prompt, None where it cannot be taken apart."""
        try:
            prompt = self.render(messages, generation_prompt=True)
            marks = read_marks(self.render(mark(messages), generation_prompt=True))
        except TemplateError:
            return None
        if marks.text != prompt or any(len(marks.positions.get(i, ())) != 1 for i in range(len(messages))):
            return None
        literals, at = [], 0
        for i, message in enumerate(messages):
            end = marks.positions[i][0]
            begin = end - len(message["content"])
            if begin < at or prompt[begin:end] != message["content"]:
                return None
            literals.append(prompt[at:begin])
            at = end
        return [*literals, prompt[at:]]

    def _marks(self, messages: list[dict], text: str) -> Marks:
        marks = read_marks(self.render(mark(messages)))
        if marks.text == text:
            return marks
        # A template may look at the very end of a text (`content.endswith("/nothink")`): mark message by message and
        # keep the marks that change nothing.
        positions: dict[int, list[int]] = {}
        calls: dict[int, set[int]] = {}
        for i in range(len(messages)):
            try:
                single = read_marks(self.render(mark(messages, only=i)))
            except TemplateError:
                continue
            if single.text == text:
                positions.update(single.positions)
                calls.update(single.calls)
            elif messages[i]["role"] == "assistant":
                raise TemplateError(
                    "the template rewrites this turn depending on its text; its span is unknown", turn=i
                )
        return Marks(text, positions, calls)

    # -- one turn ------------------------------------------------------------------------------------------------

    def _framed(self, text: str, start: int, messages: list[dict], k: int) -> Span | None:
        """The span of a turn that is text alone and is framed as earlier turns of its shape were."""
        closing = self._closings.get(_shape(messages, k))
        if closing is None or "tool_calls" in messages[k] or "reasoning_content" in messages[k]:
            return None
        content = messages[k]["content"]
        if type(content) is not str:
            return None
        for core in (content, content.strip()):
            framed = closing.lead + core + closing.tail
            if text.startswith(framed, start):
                return start, start + len(framed)
        return None

    def _after(self, text: str, prompt: str | None) -> int | None:
        """Where the text goes on after the prompt, None where it does not begin with it.

        A header that the generation prompt leaves out here (DiffusionGemma after a tool result) but that every other
        turn is given is the template's, not the model's.
        """
        if prompt is None or not text.startswith(prompt):
            return None
        header = self._header() if self.markers.search(self._header()) else ""
        return len(prompt) + (len(header) if header and text.startswith(header, len(prompt)) else 0)

    def _header(self) -> str:
        """The generation prompt after a plain question."""
        if self._opening is None:
            try:
                self._opening = self._generation_prompt([], 0, None)
            except TemplateError:
                self._opening = ""
        return self._opening

    def _located(
        self, messages: list[dict], k: int, text: str, prompt: str | None, start: int | None, marks: Marks
    ) -> Span:
        """The span of any turn, from its marks."""
        end = marks.end(k)
        assert end is not None  # _check_rendered raised otherwise
        if start is None:
            start = self._start(messages, k, text, prompt, marks)
        if not start < end:
            raise TemplateError("the template's generation prompt overlaps the text of this turn", turn=k)
        tail = self.ends.tail(messages, k, text, start, end, self._header())
        content = messages[k].get("content")
        if (
            isinstance(content, str)
            and content == content.strip()
            and content
            and _shape(messages, k)[1:] == (False, False)
        ):
            begin = end - len(content)
            if begin >= start and text[begin:end] == content:
                self._closings[_shape(messages, k)] = Closing(text[start:begin], tail)
        return start, end + len(tail)

    def _start(self, messages: list[dict], k: int, text: str, prompt: str | None, marks: Marks) -> int:
        """Where turn k starts in a render that does not begin with its prompt.

        The longest beginning of the generation prompt that stands between the previous message and the turn's own
        text is what the render holds of the prompt. Where nothing of it does (Mistral has none, Gemma goes on in the
        same turn after a tool result), what the prompt prints after the previous message is compared in its place.
        """
        generation = self._generation_prompt(messages, k, prompt).lstrip()
        before = max((marks.positions[i][-1] for i in range(k) if i in marks.positions), default=0)
        first = marks.positions[k][0]
        window = text[before:first] if before <= first else ""
        for length in range(len(generation), 0, -1):
            at = window.find(generation[:length])
            if at >= 0:
                start = whole(self.markers, text, before + at + length)
                # Also whole in the prompt's own text: `<th` of a `<think>` that the turn does not have is no part of it.
                start = min(start, before + at + whole(self.markers, generation, length))
                if start > before + at:
                    return start
                break
        own = max((t for t in _texts(messages[k]) if window.endswith(t)), key=len, default="")
        frame = window.removesuffix(own)
        held = self._held_of_prompt(messages[:k], prompt, frame, prompted=bool(generation))
        if held is not None:
            return before + held
        raise TemplateError(
            "cannot tell where this turn starts: the render of the conversation does not hold the generation prompt "
            f"{generation[-60:]!r} before it",
            turn=k,
        )

    def _held_of_prompt(self, messages: list[dict], prompt: str | None, frame: str, *, prompted: bool) -> int | None:
        """How much of `frame`, the text from the last message before a turn to the turn's own, the prompt prints after
        that message; None where that is nothing or leaves open whether more of the prompt stands further on."""
        if prompt is None:
            return None
        marks = read_marks(self.render(mark(messages), generation_prompt=True))
        if marks.text != prompt or not marks.positions:
            return None
        after = prompt[max(positions[-1] for positions in marks.positions.values()) :]
        in_prompt, in_frame = agreement(after, frame)
        in_prompt, in_frame = whole(self.markers, after, in_prompt), whole(self.markers, frame, in_frame)
        more, between = after[in_prompt:].strip(), frame[in_frame:].strip()
        expected = self.markers.search(more)
        if (expected and expected.group() in between) or not frame[:in_frame].strip():
            return None
        return in_frame if not prompted or not more or between in more else None

    def _generation_prompt(self, messages: list[dict], k: int, prompt: str | None) -> str:
        if prompt is None:  # the conversation starts with the assistant: any other conversation has the same prompt
            probe = [{"role": "user", "content": "Hi"}]
            prompt, bare = self.render(probe, generation_prompt=True), self.render(probe)
        else:
            bare = self.render(messages[:k])
        return prompt[whole(self.markers, prompt, common_prefix(prompt, bare)) :]

    def _check_rendered(self, messages: list[dict], trained: list[int], marks: Marks, text: str) -> None:
        """Raise TemplateError for a trained turn that the template drops, wholly or in its tool calls, or scatters."""
        for k in trained:
            if k not in marks.positions:
                raise TemplateError("the chat template drops this assistant turn", turn=k)
            calls = messages[k].get("tool_calls") or ()
            shown = len(marks.calls.get(k, ()))
            if shown < len(calls):
                raise TemplateError(
                    f"the chat template renders {shown} of the {len(calls)} tool calls of this turn", turn=k
                )
            for call in calls:
                arguments = call.get("function", call).get("arguments")
                if isinstance(arguments, str) and arguments.strip() not in text:
                    raise TemplateError("the chat template quotes the arguments of a tool call as a string", turn=k)
            first, last = marks.positions[k][0], marks.positions[k][-1]
            for other, positions in marks.positions.items():
                if other != k and any(first < position < last for position in positions):
                    raise TemplateError(f"the chat template prints message {other} inside this turn", turn=k)


def _texts(message: dict) -> list[str]:
    """What a message says, piece by piece: content, reasoning, names of tools."""
    content = message.get("content") or []
    pieces = [content] if isinstance(content, str) else [block["text"] for block in content]
    pieces += [message[field] for field in REASONING_FIELDS if message.get(field)]
    pieces += [call.get("function", call)["name"] for call in message.get("tool_calls") or ()]
    return [piece.strip() for piece in pieces]


def _shape(messages: list[dict], k: int) -> tuple:
    """What a template may frame a turn by: what follows, and whether it has reasoning or calls."""
    following = messages[k + 1]["role"] if k + 1 < len(messages) else None
    return following, bool(messages[k].get("reasoning_content")), bool(messages[k].get("tool_calls"))
