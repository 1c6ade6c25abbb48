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
from hf_objectives.messages import CALL, CLOSE, END, NTH, OPEN, RESERVED, mark
from hf_objectives.templates import Renderer, text_steers

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


@dataclass(frozen=True, slots=True)
class Marks:
    """Where the marks of each message were found: positions in the clean text, and tool calls seen."""

    text: str
    positions: dict[int, list[int]]
    calls: dict[int, set[int]]

    def end(self, i: int) -> int | None:
        """Position just after the last marked text of message i, None where the template dropped it."""
        return self.positions[i][-1] if i in self.positions else None


def common_prefix(a: str, b: str) -> int:
    """Length of the longest common prefix of two strings."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


class SpanFinder:
    """Finds the trained spans of conversations under one template; remembers how it frames each shape of turn.

    Args:
        render: the template with its tools and arguments.
        markers: pattern of control tokens in rendered text.
        eos_token: the tokenizer's EOS, the first choice among stop markers.
    """

    def __init__(self, render: Renderer, markers: re.Pattern[str], eos_token: str | None) -> None:
        self.render, self.markers, self.eos_token = render, markers, eos_token
        self._closings: dict[tuple, Closing] = {}
        self._closes_itself: bool | None = None
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

    def framing(self) -> str:
        """What the template prints around a short exchange: the source of the tokens that open and close turns."""
        for content in ("Hello", [{"type": "text", "text": "Hello"}]):
            user, reply = ({"role": role, "content": content} for role in ("user", "assistant"))
            for exchange in ([user, reply, user], [user, reply], [user]):
                try:
                    return self.render(exchange) + self.render(exchange[:1], generation_prompt=True)
                except TemplateError:
                    continue
        return ""

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
        header = self._header()
        return len(prompt) + (len(header) if header and text.startswith(header, len(prompt)) else 0)

    def _header(self) -> str:
        """The generation prompt after a plain question, where it holds a control token."""
        if self._opening is None:
            try:
                opening = self._generation_prompt([], 0, None)
            except TemplateError:
                opening = ""
            self._opening = opening if self.markers.search(opening) else ""
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
        tail = self._tail(messages, k, text[end:], marks)
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
        text is what the render holds of the prompt.
        """
        generation = self._generation_prompt(messages, k, prompt)
        before = max((marks.positions[i][-1] for i in range(k) if i in marks.positions), default=0)
        first = marks.positions[k][0]
        window = text[before:first] if before <= first else ""
        for length in range(len(generation), 0, -1):
            at = window.find(generation[:length])
            if at >= 0:
                start = self._whole(text, before + at + length)
                # Also whole in the prompt's own text: `<th` of a `<think>` that the turn does not have is no part of it.
                start = min(start, before + at + self._whole(generation, length))
                if start > before + at:
                    return start
                break
        raise TemplateError(
            "cannot tell where this turn starts: the render of the conversation does not hold the generation prompt "
            f"{generation[-60:]!r} before it",
            turn=k,
        )

    def _generation_prompt(self, messages: list[dict], k: int, prompt: str | None) -> str:
        if prompt is None:  # the conversation starts with the assistant: any other conversation has the same prompt
            probe = [{"role": "user", "content": "Hi"}]
            prompt, bare = self.render(probe, generation_prompt=True), self.render(probe)
        else:
            bare = self.render(messages[:k])
        return prompt[self._whole(prompt, common_prefix(prompt, bare)) :]

    def _tail(self, messages: list[dict], k: int, rest: str, marks: Marks) -> str:
        """The beginning of `rest`, the text after turn k's own, up to and with the stop marker."""
        own = self._own_tail(messages, k, rest)
        stops = list(self.markers.finditer(own))
        if self._template_closes_turns() and stops:
            eos = next((m for m in stops if m.group() == self.eos_token), None)
            return own[: (eos or stops[-1]).end()]
        # The turn is closed by what comes next: GLM stops at the next role's marker, gpt-oss prints another stop once
        # the conversation goes on.
        body = len(own.rstrip())
        following = self.markers.match(rest, body + len(rest[body:]) - len(rest[body:].lstrip()))
        return rest[: following.end()] if following else own[:body]

    def _own_tail(self, messages: list[dict], k: int, rest: str) -> str:
        """What the template prints after turn k whatever follows it."""
        last = k == len(messages) - 1
        try:
            other = read_marks(self.render(mark(messages[: k + 1]), generation_prompt=last))
        except TemplateError:
            return rest if last else ""
        end = other.end(k)
        if end is None:
            return rest if last else ""
        return rest[: self._whole(rest, common_prefix(rest, other.text[end:]))]

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

    def _whole(self, text: str, cut: int) -> int:
        """`cut`, moved back to the start of the control token that it would split."""
        begin = max(0, cut - 100)
        for found in self.markers.finditer(text, begin, min(len(text), cut + 100)):
            if found.start() < cut < found.end():
                return found.start()
        return cut

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


def read_marks(marked: str) -> Marks:
    """Take the marks out of a render: the clean text, and where each message's marks stood in it."""
    parts: list[str] = []
    positions: dict[int, list[int]] = {}
    calls: dict[int, set[int]] = {}
    at = length = 0
    called = -1
    for found in RESERVED.finditer(marked):
        if found.group() in (OPEN, CLOSE):
            continue
        parts.append(marked[at : found.start()])
        length += found.start() - at
        at = found.end()
        code = ord(found.group())
        if code >= NTH:
            # Templates name the tool again where they print its result: only the first time is the call itself.
            if code - NTH not in calls.setdefault(called, set()):
                calls[called].add(code - NTH)
                positions.setdefault(called, []).append(length)
        elif code >= CALL:
            called = code - CALL
        else:
            positions.setdefault(code - END, []).append(length)
    parts.append(marked[at:])
    return Marks("".join(parts), positions, calls)


def _shape(messages: list[dict], k: int) -> tuple:
    """What a template may frame a turn by: what follows, and whether it has reasoning or calls."""
    following = messages[k + 1]["role"] if k + 1 < len(messages) else None
    return following, bool(messages[k].get("reasoning_content")), bool(messages[k].get("tool_calls"))
