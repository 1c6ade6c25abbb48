"""Look at rows as they will be trained: which tokens are trained, what the policies leave, and what is wrong."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Unpack

import numpy as np
from numpy.typing import NDArray

from hf_objectives.errors import DataError, FormatError
from hf_objectives.inspection.findings import SEVERITIES
from hf_objectives.inspection.shown_rows import examples_to_show, packed_to_show, pieces_by_position
from hf_objectives.inspection.token_texts import TokenTexts
from hf_objectives.inspection.types import InspectedRow, LabelWarning, PackedRow, Place, Statistics, WholeRow
from hf_objectives.inspection.warnings import find_warnings
from hf_objectives.labels import EncodingConfig, EncodingOptions, Ledger, RowEncoder, encode_row, to_example
from hf_objectives.packing import check_packing
from hf_objectives.types import Row

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_BARS = 20
_REASONS = 3  # for refusing rows that are quoted


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a look at rows found."""

    examples: list[InspectedRow]  #: rows to show, at most as many as asked for, in the order of the data
    packed: list[PackedRow]  #: packed rows to show
    statistics: Statistics  #: figures over all rows
    histogram: list[tuple[int, int, int]]  #: lowest length, highest length and number of rows of each bar
    warnings: list[LabelWarning]  #: the worst first
    ledger: Ledger  #: what happened to every token, per source
    max_length: int | None  #: the limit on a row's tokens
    settings: dict[str, Any]  #: the policies by name


def inspect_rows(
    rows: Iterable[Row],
    tokenizer: Any,
    *,
    max_length: int | None = 1024,
    packing: bool = False,
    strategy: str = "best_fit",
    stops: Collection[int] = (),
    source: str = "data",
    show: int = 1_000,
    show_tokens: int = 300_000,
    **options: Unpack[EncodingOptions],
) -> Inspection:
    """Encode rows as `prepare_dataset` does, and look at the result.

    Args:
        rows: rows in any accepted format. Of a preference row the chosen side is looked at.
        tokenizer: a fast transformers tokenizer.
        max_length, packing, strategy: see `prepare_dataset`.
        stops: ids at which generation stops beside EOS, `eos_token_id` of the model's generation config.
        source: source of rows that name none.
        show: rows to return with their tokens: one of each source, then one of each warning, then the first.
        show_tokens: most tokens of these rows, and of the packed rows.
        **options: see `EncodingConfig`.

    Raises:
        DataError: no row, or no row that can be used; names source and row. Where only some rows cannot be used, that is
            the warning `refused`.
        ConfigError: an unknown setting.
    """
    if packing:
        check_packing(max_length, strategy, "split")
    settings = EncodingConfig(max_length=max_length, splits_documents=packing, **options)  # type: ignore[arg-type]  # None becomes {}
    named, places = _named(rows, source)
    whole, refused = _whole_rows(named, places, tokenizer, replace(settings, max_length=None))
    if not whole:
        refused[0].source, refused[0].row = places[0]
        raise refused[0]
    ledger = Ledger()
    labelled, _, positions = RowEncoder(tokenizer, settings).encode(named, source=source, ledger=ledger, skip=True)
    for account in ledger.accounts.values():
        for examples in account.dropped_examples.values():
            examples[:] = [places[i][1] for i in examples]
    total = ledger.total()
    trained_share = total.trained / max(1, total.trained + total.masked)
    warnings = _refused_warning(refused, places)
    warnings += find_warnings(whole, tokenizer, settings, trained_share, stops)
    warnings.sort(key=lambda warning: -SEVERITIES.index(warning.severity))
    texts = TokenTexts(tokenizer)
    shown = examples_to_show(whole, warnings, labelled, positions, settings, texts, show, show_tokens)
    packed: tuple[list[PackedRow], int | None, float | None] = [], None, None
    if packing and max_length is not None:
        documents = [places[i] for i in positions]
        packed = packed_to_show(labelled, documents, max_length, strategy, texts, show, show_tokens)
    sizes = np.array([size for row in whole for size in row.sizes])
    statistics = _statistics(sizes, len(named), ledger, max_length, packed[1:])
    policies = {name: getattr(settings, name) for name in ("train_on", "overlength", "control_tokens")}
    policies["packing"] = packing
    return Inspection(shown, packed[0], statistics, histogram(sizes), warnings, ledger, max_length, policies)


def _statistics(
    sizes: np.ndarray, num_rows: int, ledger: Ledger, max_length: int | None, packed: tuple[int | None, float | None]
) -> Statistics:
    """Figures over all rows; `sizes` are tokens before any limit, int64 [encoded rows]."""
    total = ledger.total()
    return Statistics(
        rows=num_rows,
        kept_rows=total.rows_out,
        tokens=int(sizes.sum()),
        kept_tokens=total.trained + total.masked,
        trained_tokens=total.trained,
        shortest=int(sizes.min()),
        mean=float(sizes.mean()),
        longest=int(sizes.max()),
        quantiles=tuple(map(int, np.quantile(sizes, QUANTILES, method="lower"))),
        too_long=0 if max_length is None else int((sizes > max_length).sum()),
        packed_rows=packed[0],
        fill=packed[1],
    )


def _named(rows: Iterable[Row], source: str) -> tuple[list[Row], list[Place]]:
    """Give each row its index as its number, since own numbers may repeat; return the rows and their places."""
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


def _whole_rows(
    rows: Sequence[Row], places: Sequence[Place], tokenizer: Any, settings: EncodingConfig
) -> tuple[list[WholeRow], dict[int, DataError]]:
    """Encode rows without a limit on their length. Return them, and by position why the others cannot be used."""
    encoder = RowEncoder(tokenizer, settings)
    labelled, _, positions = encoder.encode(rows, source=places[0][0], ledger=Ledger(), skip=True)
    pieces = pieces_by_position(labelled, positions)
    whole: list[WholeRow] = []
    refused: dict[int, DataError] = {}
    for position, row in enumerate(rows):
        source, number = places[position]
        arrays = pieces.get(position)
        if arrays is None:  # refused, or nothing in it is trained
            try:
                encoder.encode([row], source=source, numbers=[position], ledger=Ledger())
                alone = encode_row(
                    tokenizer,
                    row,
                    train_on=settings.train_on,
                    control_tokens=settings.control_tokens,
                    chat_template=settings.chat_template,
                    **settings.template_kwargs,
                )
            except DataError as error:
                refused[position] = error
                continue
            arrays = [(np.array(alone["input_ids"], np.int32), np.array(alone["labels"], np.int32))]
        ids, labels = (np.concatenate(parts) for parts in zip(*arrays, strict=True))
        sizes = tuple(len(part) for part, _ in arrays)
        whole.append(WholeRow(position, source, number, to_example(row), ids, labels, sizes))
    return whole, refused


def _refused_warning(refused: Mapping[int, DataError], places: Sequence[Place]) -> list[LabelWarning]:
    """The warning about rows that cannot be used, if there are any."""
    if not refused:
        return []
    reasons: defaultdict[str, list[int]] = defaultdict(list)
    for position, error in refused.items():
        reasons[error.reason].append(position)
    quoted = []
    for reason, alike in list(reasons.items())[:_REASONS]:
        (source, number), turn = places[alike[0]], refused[alike[0]].turn
        more = f" and {len(alike) - 1:,} more" if len(alike) > 1 else ""
        quoted.append(f"{source} {number}{f', turn {turn}' if turn is not None else ''}{more}: {reason}")
    evidence = f"{len(refused):,} of {len(places):,} rows cannot be used. {'; '.join(quoted)}"
    if len(reasons) > _REASONS:
        evidence += f"; and {len(reasons) - _REASONS:,} other reasons"
    advice = (
        "Training refuses the data because of them. Mend them or take them out. All else here is of the other rows."
    )
    return [LabelWarning("refused", "error", evidence, advice, tuple(places[i] for i in refused), tuple(refused))]


def histogram(sizes: NDArray[np.int64]) -> list[tuple[int, int, int]]:
    """Count int64 [rows] lengths in bars of equal, round width; of doubling width where a few rows are far longer.

    Returns:
        Lowest length, highest length (both inclusive) and number of rows of each bar, from the first to the last with rows.
    """
    shortest, longest = int(sizes.min()), int(sizes.max())
    if longest > 20 * max(1.0, float(np.median(sizes))):
        edges = [2**k for k in range(max(1, shortest).bit_length() - 1, longest.bit_length() + 1)]
    else:
        least = max(1, longest / _BARS)
        power = 10 ** int(np.log10(least))
        width = next(int(step * power) for step in (1, 2, 5, 10) if step * power >= least)
        edges = list(range(shortest // width * width, longest + width + 1, width))
    counts = np.histogram(sizes, np.array(edges, np.float64))[0]
    counts = counts[: int(np.flatnonzero(counts)[-1]) + 1]
    return [(low, high - 1, int(count)) for low, high, count in zip(edges, edges[1:], counts, strict=False)]
