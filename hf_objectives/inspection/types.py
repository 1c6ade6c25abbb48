"""What an inspection is made of: rows as they are and as they will be trained, what is wrong with them, figures."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_objectives.inspection.findings import Severity
from hf_objectives.inspection.token_texts import Token
from hf_objectives.labels import Example
from hf_objectives.types import IGNORE_INDEX

Place = tuple[str, int]
_PLACES_NAMED = 5


@dataclass(frozen=True, slots=True)
class WholeRow:
    """One row before any policy on its length.

    Attributes:
        position: its place among all rows looked at, which alone tells it from the others.
        source, number: where it is from, in words; data may give two rows the same.
        example: what it says.
        ids, labels: int32 [tokens]; several pieces of one row (`expand_turns`) end to end.
        sizes: tokens of each piece.
    """

    position: int
    source: str
    number: int
    example: Example
    ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    sizes: tuple[int, ...]

    @property
    def place(self) -> Place:
        """Source and number."""
        return self.source, self.number


@dataclass(frozen=True, slots=True)
class LabelWarning:
    """One thing that is wrong with rows.

    Attributes:
        kind: its name.
        severity: "info", "warning" or "error", as of a finding.
        evidence: what was found, in figures.
        advice: what to do.
        rows: source and number of every row that it concerns.
        positions: of the rows that show it, among all rows looked at; of repeats, the rows that they repeat as well.
    """

    kind: str
    severity: Severity
    evidence: str
    advice: str
    rows: tuple[Place, ...] = ()
    positions: tuple[int, ...] = ()

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
class InspectedRow:
    """One row as it will be trained, or as it would have been.

    Attributes:
        source, row: where it is from.
        fate: "" where the row is trained whole, else what becomes of it: "left out: ...", "cut ...", "part 1 of 3".
        input_ids, labels: int32 [tokens].
        tokens: the same with texts, in order; of a very long row the first ones.
        more: tokens that these leave out.
        warnings: kinds of the warnings about it.
    """

    source: str
    row: int
    fate: str
    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    tokens: list[Token]
    more: int
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
        rows: rows looked at, those that cannot be used among them.
        kept_rows: rows that are trained, before packing.
        tokens: tokens of the rows as they are; with `expand_turns` of the rows that are made of them, as below.
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


def warn(kind: str, severity: Severity, evidence: str, advice: str, rows: Iterable[WholeRow]) -> LabelWarning:
    """A warning about rows."""
    rows = tuple(rows)
    places, positions = tuple(row.place for row in rows), tuple(row.position for row in rows)
    return LabelWarning(kind, severity, evidence, advice, places, positions)


def trained_runs(labels: NDArray[np.int32]) -> list[tuple[int, int]]:
    """Half-open ranges of the runs of trained tokens in int32 [tokens] labels."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], labels != IGNORE_INDEX, [False])).astype(np.int8)))
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]
