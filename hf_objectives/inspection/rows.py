"""Rows as they will be trained: every token with its text and whether it is trained, lengths, and what is wrong."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_objectives.errors import ConfigError, DataError, FormatError
from hf_objectives.inspection.findings import SEVERITIES
from hf_objectives.inspection.token_texts import TokenTexts
from hf_objectives.inspection.types import InspectedRow, LabelWarning, PackedRow, Place, Statistics, WholeRow
from hf_objectives.inspection.warnings import find_warnings
from hf_objectives.labels import SKIPPED, EncodingConfig, Labelled, Ledger, RowEncoder, encode_row, to_example
from hf_objectives.packing import check_packing, pack_table
from hf_objectives.types import IGNORE_INDEX, Row

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_BARS = 20
_TOKENS_SHOWN = 300_000
_LONG_ROW = 8_000  # tokens; of a longer row the beginning is shown, unless it is trained whole
_REASONS = 3  # for refusing rows that are quoted


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
    stops: Collection[int] = (),
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
        stops: ids at which generation stops beside EOS, `eos_token_id` of the model's generation config.
        source: source of rows that name none.
        show: rows to give with their tokens: of each source one, then of each warning one, then the first.
        show_tokens: most tokens to give of them, and of the packed rows.

    Raises:
        DataError: no row, or none that can be used; names source and row. A few such rows are a warning, `refused`.
        ConfigError: an unknown setting.
    """
    if packing:
        if max_length is None:
            raise ConfigError("packing needs max_length, the number of tokens a packed row holds")
        check_packing(max_length, strategy, "split")
    kwargs = dict(template_kwargs or {})
    settings = EncodingConfig(
        max_length=max_length, train_on=train_on, control_tokens=control_tokens, overlength=overlength,
        expand_turns=expand_turns, chat_template=chat_template, template_kwargs=kwargs, splits_documents=packing,
    )  # fmt: skip
    named, places = _named(rows, source)
    labelled, positions, ledger, refused = _encoded(named, places, tokenizer, settings)
    usable = [i for i in range(len(named)) if i not in refused]
    whole = _whole_rows(usable, named, places, tokenizer, settings)
    for account in ledger.accounts.values():
        for listed in account.dropped_examples.values():
            listed[:] = [places[i][1] for i in listed]
    total = ledger.total()
    share = total.trained / max(1, total.trained + total.masked)
    warnings = _told(refused, places) + find_warnings(whole, tokenizer, settings, share, stops)
    warnings.sort(key=lambda one: -SEVERITIES.index(one.severity))
    texts = TokenTexts(tokenizer)
    examples = _examples(whole, warnings, labelled, positions, settings, texts, show, show_tokens)
    packed: list[PackedRow] = []
    count: int | None = None
    fill: float | None = None
    if packing and max_length is not None:
        where = [places[i] for i in positions]
        packed, count, fill = _packed(labelled, where, max_length, strategy, texts, show, show_tokens)
    sizes = np.array([size for row in whole for size in row.sizes])
    statistics = Statistics(
        len(named), total.rows_out, int(sizes.sum()), total.trained + total.masked, total.trained,
        int(sizes.min()), float(sizes.mean()), int(sizes.max()),
        tuple(int(size) for size in np.quantile(sizes, QUANTILES, method="lower")),
        0 if max_length is None else int((sizes > max_length).sum()), count, fill,
    )  # fmt: skip
    policies = {"train_on": train_on, "overlength": overlength, "control_tokens": control_tokens, "packing": packing}
    return Inspection(examples, packed, statistics, histogram(sizes), warnings, ledger, max_length, policies)


def _named(rows: Iterable[Row], source: str) -> tuple[list[Row], list[Place]]:
    """Rows that carry their position as their number, which alone is sure to be one row's, and their places in words."""
    named: list[Row] = []
    places: list[Place] = []
    for position, row in enumerate(rows):
        if not isinstance(row, Mapping):
            named.append(row)  # refused when it is encoded
            places.append((source, position))
            continue
        name, own = str(row.get("source") or source), row.get("row")
        named.append({**row, "source": name, "row": position})
        places.append((name, own if isinstance(own, int) else position))
    if not named:
        raise FormatError("no rows; expected at least one", source=source)
    return named, places


def _encoded(
    rows: Sequence[Row], places: Sequence[Place], tokenizer: Any, settings: EncodingConfig
) -> tuple[Labelled, list[int], Ledger, dict[int, DataError]]:
    """Rows as they will be trained, the position of each, the ledger, and the rows that cannot be used with why.

    Raises:
        DataError: no row can be used.
    """
    ledger = Ledger()
    try:
        labelled, _, positions = RowEncoder(tokenizer, settings).encode(rows, source=places[0][0], ledger=ledger)
    except DataError as error:
        first = error
        first.row = None if error.row is None else places[error.row][1]
    else:
        return labelled, positions, ledger, {}
    refused: dict[int, DataError] = {}
    encoder = RowEncoder(tokenizer, settings)
    for i, row in enumerate(rows):
        try:
            encoder.encode([row], source=places[i][0], numbers=[i], ledger=Ledger())
        except DataError as error:
            refused[i] = error
    if len(refused) == len(rows):
        raise first
    ledger = Ledger()
    usable = [row for i, row in enumerate(rows) if i not in refused]
    labelled, _, positions = RowEncoder(tokenizer, settings).encode(usable, source="", ledger=ledger)
    for i, reason in refused.items():
        account = ledger[places[i][0]]
        account.rows_in += 1
        account.drop(type(reason).__name__ + SKIPPED, tokens=0, row=i)
    return labelled, positions, ledger, refused


def _told(refused: Mapping[int, DataError], places: Sequence[Place]) -> list[LabelWarning]:
    """The warning about rows that cannot be used, if there are any."""
    if not refused:
        return []
    reasons: defaultdict[str, list[int]] = defaultdict(list)
    for i, error in refused.items():
        reasons[error.reason].append(i)
    quoted = []
    for reason, alike in list(reasons.items())[:_REASONS]:
        (name, number), turn = places[alike[0]], refused[alike[0]].turn
        more = f" and {len(alike) - 1:,} more" if len(alike) > 1 else ""
        quoted.append(f"{name} {number}{f', turn {turn}' if turn is not None else ''}{more}: {reason}")
    evidence = f"{len(refused):,} of {len(places):,} rows cannot be used. {'; '.join(quoted)}"
    if len(reasons) > _REASONS:
        evidence += f"; and {len(reasons) - _REASONS:,} other reasons"
    advice = (
        "Training refuses the data because of them. Mend them or take them out; all else here is of the other rows."
    )
    return [LabelWarning("refused", "error", evidence, advice, tuple(places[i] for i in refused), tuple(refused))]


def _whole_rows(
    usable: Sequence[int], rows: Sequence[Row], places: Sequence[Place], tokenizer: Any, settings: EncodingConfig
) -> list[WholeRow]:
    """Each usable row encoded without a limit on its length; rows that train nothing included."""
    encoder = RowEncoder(tokenizer, replace(settings, max_length=None))
    labelled, _, positions = encoder.encode([rows[i] for i in usable], source="", ledger=Ledger())
    parts: defaultdict[int, list[int]] = defaultdict(list)
    for i, position in enumerate(positions):
        parts[position].append(i)
    whole = []
    for position in usable:
        row, (source, number) = rows[position], places[position]
        if position in parts:
            arrays = [_arrays(labelled, i) for i in parts[position]]
        else:
            one = encode_row(
                tokenizer,
                row,
                train_on=settings.train_on,
                control_tokens=settings.control_tokens,
                source=source,
                row_index=number,
                chat_template=settings.chat_template,
                **settings.template_kwargs,
            )
            arrays = [(np.array(one["input_ids"], np.int32), np.array(one["labels"], np.int32))]
        ids, labels = (np.concatenate(both) for both in zip(*arrays, strict=True))
        whole.append(WholeRow(position, source, number, to_example(row), ids, labels, tuple(len(a) for a, _ in arrays)))
    return whole


def _arrays(labelled: Labelled, i: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    a, b = labelled.offsets[i], labelled.offsets[i + 1]
    return labelled.ids[a:b], labelled.labels[a:b]


def _examples(
    whole: Sequence[WholeRow],
    warnings: Sequence[LabelWarning],
    labelled: Labelled,
    positions: Sequence[int],
    settings: EncodingConfig,
    texts: TokenTexts,
    show: int,
    show_tokens: int,
) -> list[InspectedRow]:
    """Rows to show; `labelled` are the pieces that are left of rows, at `positions`."""
    pieces: defaultdict[int, list[int]] = defaultdict(list)
    for i, position in enumerate(positions):
        pieces[position].append(i)
    flags: defaultdict[int, list[str]] = defaultdict(list)
    for warning in warnings:
        for position in warning.positions:
            flags[position].append(warning.kind)
    most = max(_LONG_ROW, min(settings.max_length or 0, show_tokens // 10))
    return [
        one
        for row in _chosen(whole, warnings, show, show_tokens, most)
        for one in _inspected(row, pieces[row.position], labelled, settings, texts, tuple(flags[row.position]), most)
    ]


def _chosen(
    whole: Sequence[WholeRow], warnings: Sequence[LabelWarning], show: int, show_tokens: int, most: int
) -> list[WholeRow]:
    """The rows to show: one of each source, one of each warning (of repeats two), then the first, as there is room."""
    index = {row.position: i for i, row in enumerate(whole)}
    first: dict[str, int] = {}
    for i, row in enumerate(whole):
        first.setdefault(row.source, i)
    told = [index[position] for one in warnings for position in one.positions[: _told_by(one)] if position in index]
    picked: list[int] = []
    tokens = 0
    for i in dict.fromkeys([*first.values(), *told, *range(len(whole))]):
        size = sum(min(size, most) for size in whole[i].sizes)
        if len(picked) == show:
            break
        if picked and tokens + size > show_tokens:
            continue
        picked.append(i)
        tokens += size
    return [whole[i] for i in sorted(picked)]


def _told_by(warning: LabelWarning) -> int:
    """Rows that show what a warning means."""
    return 2 if warning.kind == "duplicates" else 1


def _inspected(
    row: WholeRow,
    pieces: Sequence[int],
    labelled: Labelled,
    settings: EncodingConfig,
    texts: TokenTexts,
    warnings: tuple[str, ...],
    most: int,
) -> list[InspectedRow]:
    """What becomes of a row: its kept pieces, or the row itself with why it is left out."""
    arrays = [_arrays(labelled, i) for i in pieces] or [(row.ids, row.labels)]
    fates = _fates(row, [len(ids) for ids, _ in arrays] if pieces else [], settings)
    return [
        InspectedRow(
            *row.place, fate, ids, labels, texts.tokens(ids[:most], labels[:most]), max(0, len(ids) - most), warnings
        )
        for (ids, labels), fate in zip(arrays, fates, strict=True)
    ]


def _fates(row: WholeRow, kept: Sequence[int], settings: EncodingConfig) -> list[str]:
    """What became of each piece of a row of which `kept` tokens are left, or of the row."""
    limit, size, made = settings.max_length, len(row.ids), len(row.sizes)
    if not kept:
        if not (row.labels != IGNORE_INDEX).any():
            return ["left out: no trained token"]
        if settings.overlength == "cut":
            return ["left out: no trained token before the cut at max_length"]
        if made > 1:
            return [f"left out: {made} parts, all longer than max_length {limit:,}"]
        return [f"left out: {size:,} tokens, longer than max_length {limit:,}"]
    if len(kept) > 1 or made > 1:
        lost = f", {made - len(kept)} others left out" if made > len(kept) else ""
        return [f"part {k + 1} of {len(kept)}{lost}" for k in range(len(kept))]
    if kept[0] < size:
        return [f"cut from {size:,} to {kept[0]:,} tokens"]
    return ["split over packed rows" if limit is not None and kept[0] > limit else ""]


def _packed(
    labelled: Labelled,
    places: Sequence[Place],
    max_length: int,
    strategy: str,
    texts: TokenTexts,
    show: int,
    show_tokens: int,
) -> tuple[list[PackedRow], int, float]:
    """Packed rows to show, how many there are, and how full they are."""
    if not len(places):
        return [], 0, 0.0
    sources, numbers = ([place[k] for place in places] for k in (0, 1))
    table = labelled.to_table().append_column("source", [sources]).append_column("row", [numbers])
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
            ids, labels = (row[key][at : at + length] for key in ("input_ids", "labels"))
            documents.append((name, number, texts.tokens(ids, labels)))
            at += length
        shown.append(PackedRow(documents))
    return shown, count, fill


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
