"""What an inspection consists of: rows before and after the policies, warnings, figures."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hf_objectives.inspection.findings import Severity
from hf_objectives.inspection.token_texts import Token
from hf_objectives.labels import Example
from hf_objectives.types import IGNORE_INDEX

Place = tuple[str, int]  #: source and number of a row, for messages
PackedRow = list[tuple[str, int, list[Token]]]  #: source, number and tokens of each document of a packed row
_PLACES_NAMED = 5


@dataclass(frozen=True, slots=True)
class WholeRow:
    """One row before any limit on its length."""

    position: int  #: index among all rows looked at; source and number may be those of several rows, this is not
    source: str
    number: int  #: with the source, where the row is from, for messages
    example: Example  #: the row in one form
    ids: NDArray[np.int32]  #: [tokens]; the pieces of one row (`expand_turns`) stand end to end
    labels: NDArray[np.int32]  #: [tokens]
    sizes: tuple[int, ...]  #: tokens of each piece

    @property
    def trains_nothing(self) -> bool:
        """Whether no token of the row is trained."""
        return not (self.labels != IGNORE_INDEX).any()


@dataclass(frozen=True, slots=True)
class LabelWarning:
    """One thing that is wrong with rows."""

    kind: str  #: its name
    severity: Severity  #: as of a `Finding`
    evidence: str  #: what was found, in figures
    advice: str  #: what to do
    rows: tuple[Place, ...] = ()  #: every row that it concerns
    positions: tuple[
        int, ...
    ] = ()  #: indices of the rows that show it; of duplicates also those of the rows they repeat

    @property
    def places(self) -> str:
        """The first rows in words: "alpaca 3, 17, 20; dolly 4 and 12 more"."""
        named: defaultdict[str, list[str]] = defaultdict(list)
        for source, row in self.rows[:_PLACES_NAMED]:
            named[source].append(str(row))
        words = "; ".join(f"{source} {', '.join(numbers)}" for source, numbers in named.items())
        more = len(self.rows) - _PLACES_NAMED
        return f"{words} and {more:,} more" if more > 0 else words


def warn(kind: str, severity: Severity, evidence: str, advice: str, rows: Iterable[WholeRow]) -> LabelWarning:
    """Make a warning about rows."""
    rows = tuple(rows)
    places, positions = tuple((row.source, row.number) for row in rows), tuple(row.position for row in rows)
    return LabelWarning(kind, severity, evidence, advice, places, positions)


@dataclass(frozen=True, slots=True)
class InspectedRow:
    """One row as it will be trained, or a row that is left out."""

    source: str
    row: int  #: with the source, where it is from
    fate: str  #: "" where the row is trained whole; else "left out: ...", "cut ..." or "part 1 of 3"
    input_ids: NDArray[np.int32]  #: [tokens]
    labels: NDArray[np.int32]  #: [tokens]
    tokens: list[Token]  #: with their texts; of a very long row the first ones
    more: int  #: how many tokens `tokens` leaves out
    warnings: tuple[str, ...]  #: kinds of the warnings about it


@dataclass(frozen=True, slots=True)
class Statistics:
    """Figures over all rows."""

    rows: int  #: rows looked at, including rows that cannot be used
    kept_rows: int  #: rows that are trained, before packing
    tokens: int  #: tokens of the whole rows; with `expand_turns` of the rows made of them, and so below
    kept_tokens: int  #: tokens that the policies keep
    trained_tokens: int  #: how many of these are trained
    shortest: int  #: tokens of a whole row
    mean: float
    longest: int
    quantiles: tuple[int, ...]  #: tokens of a whole row at the shares of `QUANTILES`
    too_long: int  #: rows longer than max_length
    packed_rows: int | None = None  #: rows after packing; None without it
    fill: float | None = None  #: share of the packed rows' room that is used

    @property
    def trained_share(self) -> float:
        """Share of the kept tokens that is trained."""
        return self.trained_tokens / max(1, self.kept_tokens)
