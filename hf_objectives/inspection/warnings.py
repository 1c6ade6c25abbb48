"""Find what is wrong with rows before anything is trained on them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from functools import cache
from typing import Any

from hf_objectives.inspection.findings import SEVERITIES
from hf_objectives.inspection.template_warnings import template_warnings
from hf_objectives.inspection.token_texts import trained_runs
from hf_objectives.inspection.types import LabelWarning, WholeRow, warn
from hf_objectives.labels import (
    ControlTokens,
    EncodingConfig,
    Example,
    content_texts,
    control_tokens,
    read_tools,
    template_of,
)

_FEW_TRAINED = 0.01
_OVERLENGTH = {
    "drop": "They are left out. Raise max_length, or keep a part of each with overlength split_turns or cut.",
    "split_turns": "They become rows of whole user turns. A single turn that is too long is left out.",
    "cut": "They are cut, and a turn that the cut goes through is not trained. Raise max_length where that is too much.",
}


def find_warnings(
    rows: Sequence[WholeRow],
    tokenizer: Any,
    settings: EncodingConfig,
    trained_share: float,
    stops: Collection[int] = (),
) -> list[LabelWarning]:
    """Find everything that is wrong with rows; the worst comes first.

    Args:
        rows: the rows, encoded whole.
        tokenizer, settings: what encoded them, and the policies under which they will be trained.
        trained_share: share of the kept tokens that is trained, 0 to 1.
        stops: ids at which generation stops, beside EOS.
    """
    found = [
        *_stops(rows, tokenizer, stops),
        *_nothing_trained(rows),
        *_doubled_bos(rows, tokenizer),
        *_control_tokens_in_text(rows, tokenizer, settings),
        *_duplicates(rows),
        *template_warnings(rows, tokenizer, settings),
        *_too_long(rows, settings),
    ]
    if 0 < trained_share < _FEW_TRAINED:
        evidence = f"{trained_share:.2%} of the tokens are trained"
        advice = "Nearly all compute goes into context. Check train_on, and whether long prompts can be shortened."
        found.append(LabelWarning("few_trained_tokens", "warning", evidence, advice))
    return sorted(found, key=lambda warning: -SEVERITIES.index(warning.severity))


def _stops(rows: Sequence[WholeRow], tokenizer: Any, known: Collection[int]) -> Iterator[LabelWarning]:
    """Trained turns whose last token, white space aside, is no control token, or one at which nothing stops."""
    stopping = {*known} | ({tokenizer.eos_token_id} - {None})
    control = set(tokenizer.added_tokens_decoder) | stopping

    @cache
    def is_blank(token: int) -> bool:
        return token not in tokenizer.added_tokens_decoder and not tokenizer.decode([token]).strip()

    stops = Counter[int]()
    turns = 0
    without: dict[int, tuple[WholeRow, int]] = {}
    beside: dict[int, WholeRow] = {}
    for row in rows:
        for turn, (start, end) in enumerate(trained_runs(row.labels)):
            turns += 1
            ids = row.ids[start:end].tolist()
            while len(ids) > 1 and is_blank(ids[-1]):
                ids.pop()
            if ids[-1] not in control:
                without.setdefault(row.position, (row, turn))
                continue
            stops[ids[-1]] += 1
            if ids[-1] not in stopping:
                beside[row.position] = row

    def names(ids: Collection[int]) -> str:
        return ", ".join(map(str, tokenizer.convert_ids_to_tokens(list(ids))))

    if missing := turns - stops.total():
        row, turn = next(iter(without.values()))
        others = f" (the others with {names([token for token, _ in stops.most_common()])})" if stops else ""
        yield warn(
            "no_stop_token",
            "error" if 2 * missing > turns else "warning",
            f"{missing:,} of {turns:,} trained turns end without a control token{others}; the first is trained turn {turn} "
            f"of {row.source} {row.number}",
            "The model does not learn to stop there. Use a chat template that prints the end of a turn after the "
            "assistant's text, and end documents with the EOS token.",
            [row for row, _ in without.values()],
        )
    if beside:
        unknown = [token for token, _ in stops.most_common() if token not in stopping]
        yield warn(
            "stop_is_not_eos",
            "warning",
            f"{sum(stops[token] for token in unknown):,} of {turns:,} trained turns end with {names(unknown)}, at which "
            f"generation does not stop: it stops at {names(sorted(stopping)) or 'no token'}",
            "If this is the end of a turn, make it the EOS token or put it into eos_token_id of the generation config (the "
            "trainers of hf_objectives do that when they save). If not, let the template print the end of a turn after it.",
            beside.values(),
        )


def _nothing_trained(rows: Sequence[WholeRow]) -> Iterator[LabelWarning]:
    none = [row for row in rows if row.trains_nothing]
    if none:
        yield warn(
            "nothing_trained",
            "error" if len(none) == len(rows) else "warning",
            f"{len(none):,} of {len(rows):,} rows have no trained token",
            "They are left out. Check train_on, and that each has an assistant message to train on (train, weight).",
            none,
        )


def _doubled_bos(rows: Sequence[WholeRow], tokenizer: Any) -> Iterator[LabelWarning]:
    bos = tokenizer.bos_token_id
    doubled = [row for row in rows if bos is not None and ((row.ids[1:] == bos) & (row.ids[:-1] == bos)).any()]
    if doubled:
        yield warn(
            "doubled_bos",
            "error",
            f"{tokenizer.bos_token} stands twice in a row in {len(doubled):,} rows",
            "The model saw it once in pretraining. Take it out of the text, or out of the chat template if the template "
            "prints it twice.",
            doubled,
        )


def _control_tokens_in_text(
    rows: Sequence[WholeRow], tokenizer: Any, settings: EncodingConfig
) -> Iterator[LabelWarning]:
    """Control tokens in a document or a message. The assistant may write its own markup, but no BOS or EOS."""
    finders: dict[str, ControlTokens] = {}
    own = ControlTokens(token for token in (tokenizer.bos_token, tokenizer.eos_token) if token)
    hits: dict[int, tuple[WholeRow, str]] = {}
    tokens: Counter[str] = Counter()
    for row in rows:
        plain_text = row.example.kind == "tokens" or row.example.is_plain
        template = "" if plain_text else template_of(tokenizer, settings.chat_template, read_tools(row.example.tools))
        if template not in finders:
            finders[template] = ControlTokens(control_tokens(tokenizer, template))
        for role, writer, text in _written(row.example, tokenizer.eos_token):
            finder = own if role == "assistant" else finders[template]
            for token in set(finder.pattern.findall(text)):
                tokens[token] += 1
                hits.setdefault(row.position, (row, writer))
    if not hits:
        return
    first, writer = next(iter(hits.values()))
    names = ", ".join(token for token, _ in tokens.most_common(4))
    plain = settings.control_tokens == "plain"
    yield warn(
        "control_tokens_in_text",
        "warning" if plain else "error",
        f"{len(hits):,} rows hold control tokens in their own text ({names}), the first {first.source} {first.number}, by "
        f"{writer}",
        "They are encoded as plain text, so no turn can be forged. If the data was rendered by a template before, take that "
        "out."
        if plain
        else "With control_tokens allow they act as if the template had printed them. Set control_tokens to plain.",
        [row for row, _ in hits.values()],
    )


def _written(example: Example, eos: str | None) -> Iterator[tuple[str, str, str]]:
    """Role, writer in words and text of everything that a row says."""
    if example.is_plain:
        # The EOS that ends an answer of a pair is read as its end, not as text.
        end = eos or "" if example.kind == "preference" else ""
        yield "", "the text", (example.text or "").removesuffix(end)
        yield "", "the rejected text", (example.rejected_text or "").removesuffix(end)
    for side, messages in (("", example.messages), (" of the rejected answer", example.rejected)):
        for turn, message in enumerate(messages):
            role = str(message.get("role"))
            yield role, f"the {role} of turn {turn}{side}", "\n".join(content_texts(message.get("content")))


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
            "Take them out. Otherwise they weigh more than you mean, and leak from training into evaluation.",
            tuple((row.source, row.number) for row in again),
            tuple(row.position for same in repeated for row in same),
        )


def _too_long(rows: Sequence[WholeRow], settings: EncodingConfig) -> Iterator[LabelWarning]:
    limit = settings.max_length
    longer = [row for row in rows if limit is not None and max(row.sizes) > limit]
    if not longer:
        return
    texts = settings.splits_documents and all(row.example.kind == "text" for row in longer)
    yield warn(
        "longer_than_max_length",
        "info" if texts or settings.overlength == "split_turns" else "warning",
        f"{len(longer):,} of {len(rows):,} rows {'have parts that ' if settings.expand_turns else ''}are longer than "
        f"max_length {limit:,}, the longest {max(max(row.sizes) for row in longer):,} tokens",
        "Packing cuts the texts and goes on in the next row; no token is lost."
        if texts
        else _OVERLENGTH[settings.overlength],
        longer,
    )
