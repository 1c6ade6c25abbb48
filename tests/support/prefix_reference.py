"""The definition of the trained spans, each prompt rendered anew: slow, and what the fast way is held against.

For the assistant message k, P is the render of the messages before it with the generation prompt and R the render of the
whole conversation. The span starts where the part of P that R contains ends, and ends with the stop marker that closes the
turn. Nothing is remembered from one turn to the next, so that a conversation of n turns takes several times n renders.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_objectives.errors import TemplateError
from hf_objectives.labels.chat import read_tools
from hf_objectives.labels.message_forms import FORMS
from hf_objectives.labels.messages import CLOSE, OPEN, REASONING_FIELDS, RESERVED, read_messages
from hf_objectives.labels.spans import Rendered
from hf_objectives.labels.templates import Renderer, marker_pattern, template_of

#: First of the code points that mark the end of a text in message i (`END + i`), and the name of its tool call j
#: (`CALL + i`, then `NTH + j`).
END, CALL, NTH = 0x100000, 0x108000, 0x10E000


@dataclass(frozen=True, slots=True)
class Marks:
    """Where the marks of each message were found: positions in the clean text, and tool calls seen."""

    text: str
    positions: dict[int, list[int]]
    calls: dict[int, set[int]]

    def end(self, i: int) -> int | None:
        """Position just after the last marked text of message i, None where the template dropped it."""
        return self.positions[i][-1] if i in self.positions else None


def mark(messages: list[dict], only: int | None = None) -> list[dict]:
    """Messages with the end of each text marked by a private code point, `END + i` in message i.

    The mark stands before trailing white space, which templates strip or keep as they like. Names of tool calls are
    marked with `CALL + i` and `NTH + j` as well, so that a call that a template leaves out is seen.
    """
    return [_marked(message, i) if only in (None, i) else message for i, message in enumerate(messages)]


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


def _marked(message: dict, i: int) -> dict:
    marked = dict(message)
    content = message.get("content")
    if isinstance(content, str):
        marked["content"] = _mark_text(content, i)
    elif content:
        marked["content"] = [{**block, "text": _mark_text(block["text"], i)} for block in content]
    for field in REASONING_FIELDS:
        if message.get(field):
            marked[field] = _mark_text(message[field], i)
    if message.get("tool_calls"):
        marked["tool_calls"] = [_mark_call(call, i, j) for j, call in enumerate(message["tool_calls"])]
    return marked


def _mark_text(text: str, i: int) -> str:
    core = text.rstrip()
    return core + chr(END + i) + text[len(core) :] if core else text


def _mark_call(call: Mapping, i: int, j: int) -> dict:
    if "function" in call:
        return {**call, "function": _mark_call(call["function"], i, j)}
    marked = {**call, "name": call["name"] + chr(CALL + i) + chr(NTH + j)}
    arguments = call.get("arguments")
    if isinstance(arguments, str):
        marked["arguments"] = _mark_text(arguments, i)
    elif arguments is not None:
        marked["arguments"] = _mark_leaves(arguments, i)
    return marked


def _mark_leaves(value: Any, i: int) -> Any:
    if isinstance(value, str):
        return _mark_text(value, i)
    if isinstance(value, Mapping):
        return {key: _mark_leaves(item, i) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_mark_leaves(item, i) for item in value]
    return value


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


def agreement(a: str, b: str) -> tuple[int, int]:
    """How far two strings say the same, white space aside: the length of that part of each."""
    i = j = in_a = in_b = 0
    while i < len(a) and j < len(b):
        if a[i] == b[j]:
            i, j = i + 1, j + 1
            in_a, in_b = i, j
        elif a[i].isspace():
            i += 1
        elif b[j].isspace():
            j += 1
        else:
            break
    return in_a, in_b


def whole(markers: re.Pattern[str], text: str, cut: int) -> int:
    """`cut`, moved back to the start of the control token that it would split."""
    begin = max(0, cut - 100)
    for found in markers.finditer(text, begin, min(len(text), cut + 100)):
        if found.start() < cut < found.end():
            return found.start()
    return cut


def _first_text(messages: list[dict]) -> str:
    """What the first message says: a control token that a user types opens no turn."""
    content = messages[0].get("content") or ""
    return (content if isinstance(content, str) else content[0]["text"]).strip()


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
        openers = self._openers(text, start, header, _first_text(messages)) if closed else set()
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

    def _openers(self, text: str, start: int, header: str, said: str) -> set[str]:
        """Control tokens that open turns, and so close none: those that the conversation begins with, and the one that
        opens the generation prompt, which some templates print unasked after an answer."""
        openers, at = set(), 0
        for found in self.markers.finditer(text, 0, text.find(said)):
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


Span = tuple[int, int]


class PrefixFinder:
    """Finds the trained spans of conversations under one template, turn by turn.

    Args:
        render: the template with its tools and arguments.
        markers: pattern of control tokens in rendered text.
        eos_token: the tokenizer's EOS, the first choice among stop markers.
    """

    def __init__(self, render: Renderer, markers: re.Pattern[str], eos_token: str | None) -> None:
        self.render, self.markers = render, markers
        self.ends = TurnEnds(render, markers, eos_token)
        self._opening: str | None = None

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
            if marks is None:
                marks = self._marks(messages, text)
                self._check_rendered(messages, trained, marks, text)
            span = self._located(messages, k, text, prompt, start, marks)
            if spans and span[0] < spans[-1][1]:
                raise TemplateError("the template renders two assistant turns over each other", turn=k)
            spans.append(span)
        return Rendered(text, spans)

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
        """The prompt of turn k."""
        try:
            return self.render(messages[:k], generation_prompt=True)
        except TemplateError as error:
            if k == 0:  # many templates refuse an empty conversation; the prompt is then looked for in another way
                return None
            error.turn = k
            raise

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
            header = self._header() if self.markers.search(self._header()) else ""
            return before + held + (len(header) if header and text.startswith(header, before + held) else 0)
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


def reference_render(tokenizer, messages, tools=None, *, train_on="assistant", **template_kwargs) -> Rendered:
    """What `ChatEncoder.render` has to return where no text holds a control token."""
    turns = read_messages(messages, train_on=train_on)
    tools = read_tools(tools)
    template = template_of(tokenizer, None, tools)
    finder = PrefixFinder(
        Renderer(tokenizer, template, tools, template_kwargs), marker_pattern(tokenizer), tokenizer.eos_token
    )
    first = None
    for form in FORMS:
        formed = form(turns.messages)
        if formed is None:
            continue
        try:
            return finder.find(formed, turns.trained)
        except TemplateError as error:
            first = first or error
    raise first
