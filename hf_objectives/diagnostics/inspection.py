"""Rows as they will be trained: every token with its text and whether it is trained, lengths, and what is wrong."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hf_objectives.chat import IGNORE, Labelled
from hf_objectives.dataset_packing import pack_table
from hf_objectives.diagnostics.inspection_warnings import LabelWarning, Place, WholeRow, find_warnings
from hf_objectives.encode import RowEncoder, RowSettings, encode_row
from hf_objectives.errors import ConfigError, FormatError
from hf_objectives.formats import Row, to_example
from hf_objectives.ledger import Ledger
from hf_objectives.packing import check_packing

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_BARS = 20
_TOKENS_SHOWN = 300_000
_WIDEST_GROUP = 8  # tokens; no character takes more, and text that never decodes must not grow without end


class Token(NamedTuple):
    """A piece of text that decodes whole, its ids (several where they share a character) and whether it is trained."""

    text: str
    ids: tuple[int, ...]
    trained: bool


@dataclass(frozen=True, slots=True)
class InspectedRow:
    """One row as it will be trained, or as it would have been.

    Attributes:
        source, row: where it is from.
        fate: "" where the row is trained whole, else what becomes of it: "left out: ...", "cut ...", "part 1 of 3".
        input_ids, labels: int32 [tokens].
        tokens: the same with texts, in order.
        warnings: kinds of the warnings about it.
    """

    source: str
    row: int
    fate: str
    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    tokens: list[Token]
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PackedRow:
    """One packed row: source, number and tokens of each of its documents, in order."""

    documents: list[tuple[str, int, list[Token]]]

    @property
    def num_tokens(self) -> int:
        """Tokens in the row."""
        return sum(len(token.ids) for _, _, tokens in self.documents for token in tokens)


@dataclass(frozen=True, slots=True)
class Statistics:
    """The rows in figures.

    Attributes:
        rows: rows looked at.
        kept_rows: rows that are trained, before packing.
        tokens: tokens of the rows as they are.
        kept_tokens, trained_tokens: tokens that are left under the policies, and those of them that are trained.
        shortest, mean, longest: tokens of a row as it is.
        quantiles: tokens of a row at the shares of `QUANTILES`.
        too_long: rows longer than max_length.
        packed_rows, fill: rows after packing and the share of their room that is used; None without packing.
    """

    rows: int
    kept_rows: int
    tokens: int
    kept_tokens: int
    trained_tokens: int
    shortest: int
    mean: float
    longest: int
    quantiles: tuple[int, ...]
    too_long: int
    packed_rows: int | None = None
    fill: float | None = None

    @property
    def trained_share(self) -> float:
        """Share of the kept tokens that is trained."""
        return self.trained_tokens / max(1, self.kept_tokens)

    def to_dict(self) -> dict[str, Any]:
        """The figures by name, for JSON."""
        return {**asdict(self), "trained_share": self.trained_share}


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a look at rows found.

    Attributes:
        examples: rows to show, at most as many as asked for, in the order of the data.
        packed: packed rows to show.
        statistics: figures over all rows.
        histogram: lowest length, highest length and number of rows of each bar.
        warnings: the worst first.
        ledger: what becomes of every token.
        max_length: the limit on a row's tokens.
        settings: the policies by name.
    """

    examples: list[InspectedRow]
    packed: list[PackedRow]
    statistics: Statistics
    histogram: list[tuple[int, int, int]]
    warnings: list[LabelWarning]
    ledger: Ledger
    max_length: int | None
    settings: dict[str, Any]


def inspect_rows(
    rows: Iterable[Row],
    tokenizer: Any,
    *,
    max_length: int | None = 1024,
    packing: bool = False,
    strategy: str = "best_fit",
    overlength: str = "drop",
    train_on: str = "assistant",
    control_tokens: str = "plain",
    expand_turns: bool = False,
    chat_template: str | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    source: str = "data",
    show: int = 1_000,
    show_tokens: int = _TOKENS_SHOWN,
) -> Inspection:
    """Encode rows as `prepare_dataset` does and look at what comes of it.

    Args:
        rows: rows in any accepted format; of preference rows the chosen side is looked at.
        tokenizer: a fast transformers tokenizer.
        max_length, packing, strategy, overlength, train_on, control_tokens, expand_turns, chat_template, template_kwargs:
            see `prepare_dataset`.
        source: source of rows that name none.
        show: rows to give with their tokens: of each source one, then of each warning one, then the first.
        show_tokens: most tokens to give of them, and of the packed rows.

    Raises:
        DataError: a row that cannot be used, or no row; names source and row.
        ConfigError: an unknown setting.
    """
    if packing:
        if max_length is None:
            raise ConfigError("packing needs max_length, the number of tokens a packed row holds")
        check_packing(max_length, strategy, "split")
    kwargs = dict(template_kwargs or {})
    settings = RowSettings(
        max_length, train_on, control_tokens, overlength, expand_turns, chat_template, kwargs, packing
    )  # fmt: skip
    named = _named(rows, source)
    whole = _whole_rows(named, tokenizer, settings)
    ledger = Ledger()
    encoder = RowEncoder(tokenizer, settings)
    labelled, sources, numbers = encoder.encode(named, source=source, ledger=ledger)
    total = ledger.total()
    share = total.trained / max(1, total.trained + total.masked)
    warnings = find_warnings(whole, tokenizer, settings, share)
    texts = TokenTexts(tokenizer)
    pieces: defaultdict[Place, list[int]] = defaultdict(list)
    for i, place in enumerate(zip(sources, numbers, strict=True)):
        pieces[place].append(i)
    chosen = _chosen(whole, warnings, show, show_tokens)
    flags: defaultdict[Place, list[str]] = defaultdict(list)
    for warning in warnings:
        for place in warning.rows:
            flags[place].append(warning.kind)
    examples = [
        one
        for row in chosen
        for one in _inspected(row, pieces[row.place], labelled, settings, texts, tuple(flags[row.place]))
    ]
    packed: list[PackedRow] = []
    count: int | None = None
    fill: float | None = None
    if packing and max_length is not None:
        packed, count, fill = _packed(labelled, sources, numbers, max_length, strategy, texts, show, show_tokens)
    sizes = np.array([len(row.ids) for row in whole])
    statistics = Statistics(
        len(whole), total.rows_out, int(sizes.sum()), total.trained + total.masked, total.trained,
        int(sizes.min()), float(sizes.mean()), int(sizes.max()),
        tuple(int(size) for size in np.quantile(sizes, QUANTILES, method="lower")),
        0 if max_length is None else int((sizes > max_length).sum()), count, fill,
    )  # fmt: skip
    policies = {"train_on": train_on, "overlength": overlength, "control_tokens": control_tokens, "packing": packing}
    return Inspection(examples, packed, statistics, histogram(sizes), warnings, ledger, max_length, policies)


def _named(rows: Iterable[Row], source: str) -> list[Row]:
    """Rows that carry their source and number."""
    named: list[Row] = []
    for position, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise FormatError(
                f"a row is {type(row).__name__}; expected a mapping of column names to values",
                source=source,
                row=position,
            )
        own = row.get("row")
        number = own if isinstance(own, int) else position
        named.append({**row, "source": str(row.get("source") or source), "row": number})
    if not named:
        raise FormatError("no rows; expected at least one", source=source)
    return named


def _whole_rows(rows: Sequence[Row], tokenizer: Any, settings: RowSettings) -> list[WholeRow]:
    """Each row encoded without a limit on its length; rows that train nothing included."""
    encoder = RowEncoder(tokenizer, replace(settings, max_length=None))
    labelled, sources, numbers = encoder.encode(rows, source="", ledger=Ledger())
    parts: defaultdict[Place, list[int]] = defaultdict(list)
    for i, place in enumerate(zip(sources, numbers, strict=True)):
        parts[place].append(i)
    whole = []
    for row in rows:
        place = row["source"], row["row"]
        if mine := parts.get(place):
            arrays = [_arrays(labelled, i) for i in mine]
            ids, labels = (np.concatenate(both) for both in zip(*arrays, strict=True))
        else:
            one = encode_row(
                tokenizer,
                row,
                train_on=settings.train_on,
                control_tokens=settings.control_tokens,
                source=place[0],
                row_index=place[1],
                chat_template=settings.chat_template,
                **settings.template_kwargs,
            )
            ids, labels = np.array(one["input_ids"], np.int32), np.array(one["labels"], np.int32)
        whole.append(WholeRow(*place, to_example(row), ids, labels))
    return whole


def _arrays(labelled: Labelled, i: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    a, b = labelled.offsets[i], labelled.offsets[i + 1]
    return labelled.ids[a:b], labelled.labels[a:b]


def _chosen(whole: Sequence[WholeRow], warnings: Sequence[LabelWarning], show: int, show_tokens: int) -> list[WholeRow]:
    """The rows to show: one of each source, one of each warning, then the first, as many as there is room for."""
    by_place = {row.place: i for i, row in enumerate(whole)}
    first: dict[str, int] = {}
    for i, row in enumerate(whole):
        first.setdefault(row.source, i)
    order = [*first.values(), *(by_place[warning.rows[0]] for warning in warnings if warning.rows), *range(len(whole))]
    picked: list[int] = []
    tokens = 0
    for i in dict.fromkeys(order):
        if len(picked) == show or (tokens + len(whole[i].ids) > show_tokens and picked):
            break
        picked.append(i)
        tokens += len(whole[i].ids)
    return [whole[i] for i in sorted(picked)]


def _inspected(
    row: WholeRow,
    pieces: Sequence[int],
    labelled: Labelled,
    settings: RowSettings,
    texts: TokenTexts,
    warnings: tuple[str, ...],
) -> list[InspectedRow]:
    """What becomes of a row: its kept pieces, or the row itself with why it is left out."""
    limit, size = settings.max_length, len(row.ids)
    if not pieces:
        if not (row.labels != IGNORE).any():
            fate = "left out: no trained token"
        elif settings.overlength == "cut":
            fate = "left out: no trained token before the cut at max_length"
        else:
            fate = f"left out: {size:,} tokens, longer than max_length {limit:,}"
        arrays, fates = [(row.ids, row.labels)], [fate]
    else:
        arrays = [_arrays(labelled, i) for i in pieces]
        kept = sum(len(ids) for ids, _ in arrays)
        if len(pieces) > 1:
            fates = [f"part {k + 1} of {len(pieces)}" for k in range(len(pieces))]
        elif kept < size:
            fates = [f"cut from {size:,} to {kept:,} tokens"]
        elif limit is not None and kept > limit:
            fates = ["split over packed rows"]
        else:
            fates = [""]
    return [
        InspectedRow(*row.place, fate, ids, labels, texts.tokens(ids, labels), warnings)
        for (ids, labels), fate in zip(arrays, fates, strict=True)
    ]


def _packed(
    labelled: Labelled,
    sources: Sequence[str],
    numbers: Sequence[int],
    max_length: int,
    strategy: str,
    texts: TokenTexts,
    show: int,
    show_tokens: int,
) -> tuple[list[PackedRow], int, float]:
    """Packed rows to show, how many there are, and how full they are."""
    if not len(numbers):
        return [], 0, 0.0
    table = labelled.to_table().append_column("source", [list(sources)]).append_column("row", [list(numbers)])
    packed = pack_table(table, max_length, strategy=strategy, overflow="split", allow_empty=True)
    count = packed.num_rows
    lengths = packed["seq_lengths"].combine_chunks().flatten().to_numpy()
    fill = float(lengths.sum() / max(1, count * max_length))
    shown: list[PackedRow] = []
    tokens = 0
    for row in packed.slice(0, show).to_pylist():
        tokens += len(row["input_ids"])
        if shown and tokens > show_tokens:
            break
        documents, at = [], 0
        for name, number, length in zip(row["sources"], row["rows"], row["seq_lengths"], strict=True):
            ids, labels = (np.array(row[key][at : at + length], np.int32) for key in ("input_ids", "labels"))
            documents.append((name, number, texts.tokens(ids, labels)))
            at += length
        shown.append(PackedRow(documents))
    return shown, count, fill


class TokenTexts:
    """Texts of tokens in their context: what each adds to the decoded text, tokens that share a character together.

    Args:
        tokenizer: a fast transformers tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._backend = tokenizer.backend_tokenizer
        self._added: dict[tuple[tuple[int, ...], tuple[int, ...]], str | None] = {}

    def tokens(self, ids: NDArray[np.int32], labels: NDArray[np.int32]) -> list[Token]:
        """Ids and labels, int32 [tokens], as tokens whose texts join to the decoded row."""
        tokens: list[Token] = []
        before: tuple[int, ...] = ()
        start = 0
        listed, trained = ids.tolist(), (labels != IGNORE).tolist()
        for end in range(1, len(listed) + 1):
            group = tuple(listed[start:end])
            text = self._text(before, group)
            last = end == len(listed) or len(group) == _WIDEST_GROUP
            if text is None and not last:
                continue
            if text is None:
                text = self._decode(before + group)[len(self._decode(before)) :]
            tokens.append(Token(text, group, any(trained[start:end])))
            before, start = group, end
        return tokens

    def _text(self, before: tuple[int, ...], group: tuple[int, ...]) -> str | None:
        """What `group` adds to `before`; None while it ends within a character."""
        key = before, group
        if key not in self._added:
            alone, both = self._decode(before), self._decode(before + group)
            whole = not both.endswith("\ufffd") and both.startswith(alone) and (len(both) > len(alone) or not before)
            self._added[key] = both[len(alone) :] if whole else None
        return self._added[key]

    def _decode(self, ids: tuple[int, ...]) -> str:
        return self._backend.decode(list(ids), skip_special_tokens=False) if ids else ""


def histogram(sizes: NDArray[np.int64]) -> list[tuple[int, int, int]]:
    """Bars of equal, round width over int64 [rows] lengths; of doubling width where a few rows are far longer than most.

    Returns:
        Lowest length, highest length (both inclusive) and number of rows of each bar, from the first to the last with rows.
    """
    longest = int(sizes.max())
    if longest > 20 * max(1.0, float(np.median(sizes))):
        edges = [2**k for k in range(max(0, int(np.log2(max(1, sizes.min())))), longest.bit_length() + 1)]
    else:
        least = max(1, longest / _BARS)
        power = 10 ** int(np.log10(least))
        width = next(int(step * power) for step in (1, 2, 5, 10) if step * power >= least)
        edges = list(range(int(sizes.min()) // width * width, longest + width + 1, width))
    counts = np.histogram(sizes, np.array(edges, np.float64))[0]
    bars = [(low, high - 1, int(n)) for low, high, n in zip(edges, edges[1:], counts, strict=False)]
    while bars and not bars[-1][2]:
        bars.pop()
    return bars
