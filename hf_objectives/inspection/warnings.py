"""What is wrong with rows before anything is trained on them: each warning with its rows and what to do."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from hf_objectives.inspection.findings import SEVERITIES
from hf_objectives.inspection.template_warnings import template_warnings
from hf_objectives.inspection.types import LabelWarning, WholeRow, trained_runs, warn
from hf_objectives.labels import (
    ControlTokens,
    EncodingConfig,
    Example,
    content_texts,
    control_tokens,
    read_tools,
    template_of,
)
from hf_objectives.types import IGNORE_INDEX

_FEW_TRAINED = 0.01
_OVERLENGTH = {
    "drop": "They are left out. Raise max_length, or keep a part of each with overlength split_turns or cut.",
    "split_turns": "They become rows of whole user turns; a single turn that is too long is left out.",
    "cut": "They are cut, and a turn that the cut goes through is not trained. Raise max_length where that is too much.",
}


def find_warnings(
    rows: Sequence[WholeRow],
    tokenizer: Any,
    settings: EncodingConfig,
    trained_share: float,
    stops: Collection[int] = (),
) -> list[LabelWarning]:
    """All warnings about rows, the worst first.

    Args:
        rows: the rows, encoded whole.
        tokenizer: what encoded them.
        settings: the policies under which they will be trained.
        trained_share: share of the kept tokens that is trained, 0 to 1.
        stops: ids at which generation stops, beside EOS.
    """
    found = [
        *_stops(rows, tokenizer, stops),
        *_untrained(rows),
        *_doubled_bos(rows, tokenizer),
        *_control_in_text(rows, tokenizer, settings),
        *_duplicates(rows),
        *template_warnings(rows, tokenizer, settings),
        *_too_long(rows, settings),
    ]
    if 0 < trained_share < _FEW_TRAINED:
        found.append(
            LabelWarning(
                "few_trained_tokens",
                "warning",
                f"{trained_share:.2%} of the tokens are trained",
                "Nearly all compute goes into context. Check train_on, and whether long prompts can be shortened.",
            )
        )
    return sorted(found, key=lambda one: -SEVERITIES.index(one.severity))


def _stops(rows: Sequence[WholeRow], tokenizer: Any, known: Collection[int]) -> Iterator[LabelWarning]:
    """Turns whose last trained token, white space aside, is no control token, or one at which nothing stops."""
    eos = tokenizer.eos_token_id
    stopping = {*known} if eos is None else {eos, *known}
    control = set(tokenizer.added_tokens_decoder) | stopping
    blank: dict[int, bool] = {}
    turns, stops, others = 0, Counter[int](), Counter[int]()
    without: dict[int, tuple[WholeRow, int]] = {}
    beside: dict[int, WholeRow] = {}
    for row in rows:
        for k, (start, end) in enumerate(trained_runs(row.labels)):
            turns += 1
            last = end - 1
            while last > start and blank.setdefault(int(row.ids[last]), _is_blank(tokenizer, int(row.ids[last]))):
                last -= 1
            token = int(row.ids[last])
            if token not in control:
                without.setdefault(row.position, (row, k))
                continue
            stops[token] += 1
            if token not in stopping:
                others[token] += 1
                beside[row.position] = row
    if missing := turns - stops.total():
        names = _names(tokenizer, stops)
        row, k = next(iter(without.values()))
        yield warn(
            "no_stop_token",
            "error" if 2 * missing > turns else "warning",
            f"{missing:,} of {turns:,} trained turns end without a control token"
            + (f" (the others with {names})" if names else "")
            + f"; the first is trained turn {k} of {row.source} {row.number}",
            "The model is not taught to stop there. Use a chat template that prints the end of a turn after the "
            "assistant's text, and end documents with the EOS token.",
            [row for row, _ in without.values()],
        )
    if others:
        yield warn(
            "stop_is_not_eos",
            "warning",
            f"{others.total():,} of {turns:,} trained turns end with {_names(tokenizer, others)}, at which generation does "
            f"not stop: it stops at {_names(tokenizer, dict.fromkeys(sorted(stopping))) or 'no token'}",
            "If this is the end of a turn, make it the EOS token or put it into eos_token_id of the generation config (the "
            "trainers of hf_objectives do that when they save); if not, let the template print the end of a turn behind it.",
            beside.values(),
        )


def _names(tokenizer: Any, tokens: Collection[int]) -> str:
    """Tokens by name, the most frequent first where they are counted."""
    ordered = [token for token, _ in tokens.most_common()] if isinstance(tokens, Counter) else list(tokens)
    return ", ".join(map(str, tokenizer.convert_ids_to_tokens(ordered)))


def _is_blank(tokenizer: Any, token: int) -> bool:
    return token not in tokenizer.added_tokens_decoder and not tokenizer.decode([token]).strip()


def _untrained(rows: Sequence[WholeRow]) -> Iterator[LabelWarning]:
    none = [row for row in rows if not (row.labels != IGNORE_INDEX).any()]
    if none:
        yield warn(
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
    doubled = [row for row in rows if ((row.ids[1:] == bos) & (row.ids[:-1] == bos)).any()]
    if doubled:
        yield warn(
            "doubled_bos",
            "error",
            f"{tokenizer.bos_token} stands twice in a row in {len(doubled):,} rows",
            "The model saw it once in pretraining. Take it out of the text, or out of the chat template if the template "
            "prints it twice.",
            doubled,
        )


def _control_in_text(rows: Sequence[WholeRow], tokenizer: Any, settings: EncodingConfig) -> Iterator[LabelWarning]:
    """Control tokens that a document or somebody in a conversation wrote; the assistant may write its own markup."""
    finders: dict[str | None, ControlTokens] = {}
    own = ControlTokens(token for token in (tokenizer.bos_token, tokenizer.eos_token) if token)
    hits: dict[int, tuple[WholeRow, str]] = {}
    tokens: Counter[str] = Counter()
    for row in rows:
        template = None if row.example.kind == "tokens" or row.example.is_plain else _template(row, tokenizer, settings)
        if template not in finders:
            finders[template] = ControlTokens(control_tokens(tokenizer, template or ""))
        for role, who, text in _said(row.example, tokenizer.eos_token):
            finder = own if role == "assistant" else finders[template]
            for token in set(finder.pattern.findall(text)):
                tokens[token] += 1
                hits.setdefault(row.position, (row, who))
    if not hits:
        return
    first, who = next(iter(hits.values()))
    names = ", ".join(token for token, _ in tokens.most_common(4))
    plain = settings.control_tokens == "plain"
    yield warn(
        "control_tokens_in_text",
        "warning" if plain else "error",
        f"{len(hits):,} rows hold control tokens in their own text ({names}), the first {first.source} {first.number}, "
        f"by {who}",
        "They are encoded as plain text, so no turn can be forged. If the data was rendered by a template before, take "
        "that out."
        if plain
        else "With control_tokens allow they act as if the template had printed them. Set control_tokens to plain.",
        [row for row, _ in hits.values()],
    )


def _said(example: Example, eos: str | None) -> Iterator[tuple[str, str, str]]:
    """Role, place in words and text of everything written by hand."""
    if example.is_plain:
        for who, text in (("the text", example.text), ("the rejected text", example.rejected_text)):
            # The EOS that ends an answer of a pair is read as its end, not as text.
            yield "", who, (text or "").removesuffix(eos or "" if example.kind == "preference" else "")
    for side, messages in (("", example.messages), (" of the rejected answer", example.rejected)):
        for turn, message in enumerate(messages):
            role = str(message.get("role"))
            yield role, f"the {role} of turn {turn}{side}", "\n".join(content_texts(message.get("content")))


def _template(row: WholeRow, tokenizer: Any, settings: EncodingConfig) -> str:
    return template_of(tokenizer, settings.chat_template, read_tools(row.example.tools))


def _duplicates(rows: Sequence[WholeRow]) -> Iterator[LabelWarning]:
    groups: defaultdict[bytes, list[WholeRow]] = defaultdict(list)
    for row in rows:
        groups[row.ids.tobytes()].append(row)
    repeated = [same for same in groups.values() if len(same) > 1]
    if repeated:
        again = sorted((row for same in repeated for row in same[1:]), key=lambda row: row.position)
        (first, second), largest = repeated[0][:2], max(map(len, repeated))
        yield LabelWarning(
            "duplicates",
            "warning",
            f"{len(again):,} of {len(rows):,} rows repeat an earlier one token for token, one of them {largest:,} times in "
            f"all; the first is {first.source} {first.number}, again as {second.source} {second.number}",
            "Take them out, or they weigh more than you mean and leak from training into evaluation.",
            tuple(row.place for row in again),
            tuple(row.position for same in repeated for row in same),
        )


def _too_long(rows: Sequence[WholeRow], settings: EncodingConfig) -> Iterator[LabelWarning]:
    limit = settings.max_length
    if limit is None:
        return
    longer = [row for row in rows if max(row.sizes) > limit]
    if not longer:
        return
    texts = settings.splits_documents and all(row.example.kind == "text" for row in longer)
    longest = max(max(row.sizes) for row in longer)
    yield warn(
        "longer_than_max_length",
        "info" if texts or settings.overlength == "split_turns" else "warning",
        f"{len(longer):,} of {len(rows):,} rows {'have parts that ' if settings.expand_turns else ''}are longer than "
        f"max_length {limit:,}, the longest {longest:,} tokens",
        "Packing cuts the texts and goes on in the next row; no token is lost."
        if texts
        else _OVERLENGTH[settings.overlength],
        longer,
    )
