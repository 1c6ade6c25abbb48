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
    """One row before any limit on its length.

    Attributes:
        position: index among all rows looked at. Source and number may be those of several rows, this is not.
        source, number: where the row is from, for messages.
        example: the row in one form.
        ids, labels: int32 [tokens]; the pieces of one row (`expand_turns`) stand end to end.
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
    def trains_nothing(self) -> bool:
        """Whether no token of the row is trained."""
        return not (self.labels != IGNORE_INDEX).any()


@dataclass(frozen=True, slots=True)
class LabelWarning:
    """One thing that is wrong with rows.

    Attributes:
        kind: its name.
        severity: "info", "warning" or "error", as of a `Finding`.
        evidence: what was found, in figures.
        advice: what to do.
        rows: source and number of every row that it concerns.
        positions: indices of the rows that show it; of duplicates also those of the rows that they repeat.
    """

    kind: str
    severity: Severity
    evidence: str
    advice: str
    rows: tuple[Place, ...] = ()
    positions: tuple[int, ...] = ()

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
    """One row as it will be trained, or a row that is left out.

    Attributes:
        source, row: where it is from.
        fate: "" where the row is trained whole; else "left out: ...", "cut ..." or "part 1 of 3".
        input_ids, labels: int32 [tokens].
        tokens: the tokens with their texts; of a very long row the first ones.
        more: how many tokens `tokens` leaves out.
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
class Statistics:
    """Figures over all rows.

    Attributes:
        rows: rows looked at, including rows that cannot be used.
        kept_rows: rows that are trained, before packing.
        tokens: tokens of the whole rows; with `expand_turns` of the rows made of them, and so below.
        kept_tokens, trained_tokens: tokens that the policies keep, and how many of them are trained.
        shortest, mean, longest: tokens of a whole row.
        quantiles: tokens of a whole row at the shares of `QUANTILES`.
        too_long: rows longer than max_length.
        packed_rows, fill: rows after packing, and the share of their room that is used; None without packing.
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
