"""What is wrong with rows before anything is trained on them: each warning with its rows and what to do."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_objectives.chat import IGNORE, read_tools
from hf_objectives.diagnostics.findings import SEVERITIES, Severity
from hf_objectives.encode import RowSettings
from hf_objectives.errors import DataError
from hf_objectives.formats import Example
from hf_objectives.messages import REASONING_FIELDS, ROLES, ControlTokens, content_texts, read_messages
from hf_objectives.templates import Renderer, control_tokens, marker_pattern, template_of

Place = tuple[str, int]
_BLANK = "\U0010abcd"  # a private code point that stands for what a message says
_ADDED_CHARACTERS = 12  # shorter text that a template adds is a role's name or a label
_ADDED_SHARE = 0.1  # of the rows; rarer text is part of a schema or of a call
_FEW_TRAINED = 0.01
_PLACES_NAMED = 5
_OVERLENGTH = {
    "drop": "They are left out. Raise max_length, or keep a part of each with overlength split_turns or cut.",
    "split_turns": "They become rows of whole user turns; a single turn that is too long is left out.",
    "cut": "They are cut, and a turn that the cut goes through is not trained. Raise max_length where that is too much.",
}


@dataclass(frozen=True, slots=True)
class LabelWarning:
    """One thing that is wrong with rows.

    Attributes:
        kind: its name.
        severity: "info", "warning" or "error", as of a finding.
        evidence: what was found, in figures.
        advice: what to do.
        rows: source and number of every row that it concerns.
    """

    kind: str
    severity: Severity
    evidence: str
    advice: str
    rows: tuple[Place, ...]

    @property
    def places(self) -> str:
        """The first rows in words: "alpaca 3, 17, 20, dolly 4 and 12 more"."""
        named: defaultdict[str, list[str]] = defaultdict(list)
        for source, row in self.rows[:_PLACES_NAMED]:
            named[source].append(str(row))
        words = "; ".join(f"{source} {', '.join(numbers)}" for source, numbers in named.items())
        more = len(self.rows) - _PLACES_NAMED
        return f"{words} and {more:,} more" if more > 0 else words


@dataclass(frozen=True, slots=True)
class WholeRow:
    """One row before any policy on its length.

    Attributes:
        source, number: where it is from.
        example: what it says.
        ids, labels: int32 [tokens]; several pieces of one row (`expand_turns`) end to end.
    """

    source: str
    number: int
    example: Example
    ids: NDArray[np.int32]
    labels: NDArray[np.int32]

    @property
    def place(self) -> Place:
        """Source and number."""
        return self.source, self.number


def find_warnings(
    rows: Sequence[WholeRow], tokenizer: Any, settings: RowSettings, trained_share: float
) -> list[LabelWarning]:
    """All warnings about rows, the worst first.

    Args:
        rows: the rows, encoded whole.
        tokenizer: what encoded them.
        settings: the policies under which they will be trained.
        trained_share: share of the kept tokens that is trained, 0 to 1.
    """
    found = [
        *_stops(rows, tokenizer),
        *_untrained(rows),
        *_doubled_bos(rows, tokenizer),
        *_control_in_text(rows, tokenizer, settings),
        *_duplicates(rows),
        *_added_text(rows, tokenizer, settings),
        *_too_long(rows, settings),
    ]
    if 0 < trained_share < _FEW_TRAINED:
        found.append(
            LabelWarning(
                "few_trained_tokens",
                "warning",
                f"{trained_share:.2%} of the tokens are trained",
                "Nearly all compute goes into context. Check train_on, and whether long prompts can be shortened.",
                (),
            )
        )
    return sorted(found, key=lambda one: -SEVERITIES.index(one.severity))


def _stops(rows: Sequence[WholeRow], tokenizer: Any) -> Iterator[LabelWarning]:
    """Turns whose last trained token, white space aside, is no control token."""
    control = set(tokenizer.added_tokens_decoder) | {tokenizer.eos_token_id}
    blank: dict[int, bool] = {}
    turns, stops = 0, Counter[int]()
    without: dict[Place, int] = {}
    for row in rows:
        for k, (start, end) in enumerate(trained_runs(row.labels)):
            turns += 1
            last = end - 1
            while last > start and blank.setdefault(int(row.ids[last]), _is_blank(tokenizer, int(row.ids[last]))):
                last -= 1
            if int(row.ids[last]) in control:
                stops[int(row.ids[last])] += 1
            else:
                without.setdefault(row.place, k)
    missing = turns - stops.total()
    if not missing:
        return
    names = ", ".join(map(str, tokenizer.convert_ids_to_tokens([token for token, _ in stops.most_common()])))
    (source, number), k = next(iter(without.items()))
    yield LabelWarning(
        "no_stop_token",
        "error" if 2 * missing > turns else "warning",
        f"{missing:,} of {turns:,} trained turns end without a control token"
        + (f" (the others with {names})" if names else "")
        + f"; the first is trained turn {k} of {source} {number}",
        "The model is not taught to stop there. Use a chat template that prints the end of a turn after the assistant's "
        "text, and end documents with the EOS token.",
        tuple(without),
    )


def _is_blank(tokenizer: Any, token: int) -> bool:
    return token not in tokenizer.added_tokens_decoder and not tokenizer.decode([token]).strip()


def trained_runs(labels: NDArray[np.int32]) -> list[tuple[int, int]]:
    """Half-open ranges of the runs of trained tokens in int32 [tokens] labels."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], labels != IGNORE, [False])).astype(np.int8)))
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]


def _untrained(rows: Sequence[WholeRow]) -> Iterator[LabelWarning]:
    none = tuple(row.place for row in rows if not (row.labels != IGNORE).any())
    if none:
        yield LabelWarning(
            "nothing_trained",
            "error" if len(none) == len(rows) else "warning",
            f"{len(none):,} of {len(rows):,} rows have no trained token",
            "They are left out. Check that each has an assistant message that is to be trained (train, weight), and "
            "train_on.",
            none,
        )


def _doubled_bos(rows: Sequence[WholeRow], tokenizer: Any) -> Iterator[LabelWarning]:
    bos = tokenizer.bos_token_id
    if bos is None:
        return
    doubled = tuple(row.place for row in rows if ((row.ids[1:] == bos) & (row.ids[:-1] == bos)).any())
    if doubled:
        yield LabelWarning(
            "doubled_bos",
            "error",
            f"{tokenizer.bos_token} stands twice in a row in {len(doubled):,} rows",
            "The model saw it once in pretraining. Take it out of the text, or out of the chat template if the template "
            "prints it twice.",
            doubled,
        )


def _control_in_text(rows: Sequence[WholeRow], tokenizer: Any, settings: RowSettings) -> Iterator[LabelWarning]:
    """Control tokens that a document or somebody in a conversation wrote; the assistant may write its own markup."""
    finders: dict[str | None, ControlTokens] = {}
    own = ControlTokens(token for token in (tokenizer.bos_token, tokenizer.eos_token) if token)
    hits: dict[Place, str] = {}
    tokens: Counter[str] = Counter()
    for row in rows:
        template = None if row.example.kind == "tokens" or row.example.is_plain else _template(row, tokenizer, settings)
        if template not in finders:
            finders[template] = ControlTokens(control_tokens(tokenizer, template or ""))
        for turn, (role, text) in enumerate(_said(row.example)):
            finder = own if role == "assistant" else finders[template]
            for token in set(finder.pattern.findall(text)):
                tokens[token] += 1
                hits.setdefault(row.place, f"the {role} of turn {turn}" if role else "the text")
    if not hits:
        return
    (source, number), who = next(iter(hits.items()))
    names = ", ".join(token for token, _ in tokens.most_common(4))
    plain = settings.control_tokens == "plain"
    yield LabelWarning(
        "control_tokens_in_text",
        "warning" if plain else "error",
        f"{len(hits):,} rows hold control tokens in their own text ({names}), the first {source} {number}, by {who}",
        "They are encoded as plain text, so no turn can be forged. If the data was rendered by a template before, take "
        "that out."
        if plain
        else "With control_tokens allow they act as if the template had printed them. Set control_tokens to plain.",
        tuple(hits),
    )


def _said(example: Example) -> Iterator[tuple[str, str]]:
    """Role and text of everything written by hand."""
    if example.is_plain:
        yield "", example.text
    for message in example.messages:
        yield str(message.get("role")), "\n".join(content_texts(message.get("content")))


def _template(row: WholeRow, tokenizer: Any, settings: RowSettings) -> str:
    return template_of(tokenizer, settings.chat_template, read_tools(row.example.tools))


def _duplicates(rows: Sequence[WholeRow]) -> Iterator[LabelWarning]:
    groups: defaultdict[bytes, list[Place]] = defaultdict(list)
    for row in rows:
        groups[row.ids.tobytes()].append(row.place)
    repeated = [places for places in groups.values() if len(places) > 1]
    if repeated:
        again = tuple(place for places in repeated for place in places[1:])
        first, largest = repeated[0], max(map(len, repeated))
        yield LabelWarning(
            "duplicates",
            "warning",
            f"{len(again):,} of {len(rows):,} rows repeat an earlier one token for token, one of them {largest:,} times in "
            f"all; the first is {first[0][0]} {first[0][1]}, again as {first[1][0]} {first[1][1]}",
            "Take them out, or they weigh more than you mean and leak from training into evaluation.",
            again,
        )


def _too_long(rows: Sequence[WholeRow], settings: RowSettings) -> Iterator[LabelWarning]:
    limit = settings.max_length
    longer = [row for row in rows if limit is not None and len(row.ids) > limit]
    if settings.expand_turns or not longer:  # its pieces are rows of their own, and in the ledger
        return
    texts = settings.splits_documents and all(row.example.kind == "text" for row in longer)
    longest = max(len(row.ids) for row in longer)
    yield LabelWarning(
        "longer_than_max_length",
        "info" if texts or settings.overlength == "split_turns" else "warning",
        f"{len(longer):,} of {len(rows):,} rows are longer than max_length {limit:,}, the longest {longest:,} tokens",
        "Packing cuts the texts and goes on in the next row; no token is lost."
        if texts
        else _OVERLENGTH[settings.overlength],
        tuple(row.place for row in longer),
    )


# -- text that a template adds ---------------------------------------------------------------------------------------


def _added_text(rows: Sequence[WholeRow], tokenizer: Any, settings: RowSettings) -> Iterator[LabelWarning]:
    chats = [row for row in rows if row.example.messages]
    markers, added = marker_pattern(tokenizer), defaultdict[str, list[Place]](list)
    dated: list[Place] = []
    for row in chats:
        template = _template(row, tokenizer, settings)
        for piece in added_pieces(row.example, tokenizer, template, settings, markers):
            added[piece].append(row.place)
        if "strftime_now" in template:
            dated.append(row.place)
    for piece, places in sorted(added.items(), key=lambda one: -len(one[1])):
        if len(places) < max(min(2, len(chats)), _ADDED_SHARE * len(chats)):
            continue
        shown = piece if len(piece) <= 160 else f"{piece[:157]}..."
        yield LabelWarning(
            "template_adds_text",
            "warning",
            f"the chat template writes {shown!r} into {len(places):,} of {len(chats):,} conversations; no message says so",
            "The model is trained to expect it. Give the conversations a system message of their own, or change the "
            "template, unless it is used in the same way at inference.",
            tuple(places),
        )
    if dated:
        yield LabelWarning(
            "date_in_template",
            "warning",
            f"the chat template asks for the date, so {len(dated):,} conversations may show the day of their preparation",
            "Prepare the data on one day, or give the template a fixed date in template_kwargs if it takes one.",
            tuple(dated),
        )


def added_pieces(
    example: Example, tokenizer: Any, template: str, settings: RowSettings, markers: re.Pattern[str]
) -> list[str]:
    """The texts that a template prints around what a conversation says: no control tokens, role names or schemas.

    Args:
        example: a row with messages.
        template: the template's text.
        settings: gives `template_kwargs`.
        markers: pattern of control tokens in rendered text.

    Returns:
        Each piece once; none where the template refuses the conversation without its texts.
    """
    tools = read_tools(example.tools)
    render = Renderer(tokenizer, template, tools, {**settings.template_kwargs, **example.template_kwargs})
    messages = read_messages(example.messages).messages
    try:
        text = render([_blanked(message) for message in messages])
    except DataError:  # a template that reads the text itself; the encoder has rendered the row as it is
        return []
    calls = [call.get("function", call) for message in messages for call in message.get("tool_calls") or ()]
    schemas = [tool.get("function", tool) for tool in render.tools or () if isinstance(tool, Mapping)]
    names = {str(one["name"]) for one in [*calls, *schemas] if one.get("name")}
    pieces = []
    for part in re.split(f"{_BLANK}|{markers.pattern}", text):
        lines = [line for line in part.strip().splitlines() if not _is_schema(line, names)]
        if lines and lines[0].strip().rstrip(":").lower() in ROLES:
            lines = lines[1:]
        piece = "\n".join(lines).strip()
        if len(piece) >= _ADDED_CHARACTERS and re.search(r"\w{3}", piece):
            pieces.append(piece)
    return list(dict.fromkeys(pieces))


def _blanked(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message whose texts are one private code point."""
    blanked = dict(message)
    content = message.get("content")
    if isinstance(content, str):
        blanked["content"] = _BLANK
    elif content:
        blanked["content"] = [{**block, "text": _BLANK} for block in content]
    return {key: _BLANK if key in REASONING_FIELDS else value for key, value in blanked.items()}


def _is_schema(line: str, names: set[str]) -> bool:
    """Whether a line prints a tool or a call: JSON, or with the name of one."""
    if any(name in line for name in names):
        return True
    try:
        return isinstance(json.loads(line), (dict, list))
    except json.JSONDecodeError:
        return False
