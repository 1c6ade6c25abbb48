"""What a mixture asked for and what it gave, source by source."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class SourceReport:
    """One source at one moment.

    Attributes:
        name: its name.
        asked: its share of what was drawn, as the weights up to here ask for, from 0 to 1.
        share: its share of what was drawn.
        tokens, examples: what it gave; tokens are 0 where rows have no `input_ids`.
        epochs: epochs that are over; of a stream, whole ones only in the first epoch.
    """

    name: str
    asked: float
    share: float
    tokens: int
    examples: int
    epochs: float


@dataclass(frozen=True, slots=True)
class MixtureReport:
    """A mixture at one moment: one report a source.

    Attributes:
        row: rows that were taken.
        unit: what the shares count.
        counted: what `row` counts: "rows", or "steps" for a report that was read from a training log.
    """

    row: int
    unit: str
    sources: list[SourceReport]
    counted: str = "rows"

    def __iter__(self) -> Iterator[SourceReport]:
        return iter(self.sources)

    def __getitem__(self, name: str) -> SourceReport:
        return next(source for source in self.sources if source.name == name)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    def metrics(self) -> dict[str, float]:
        """The keys of a training log: `mixture/<source>/share`, `asked`, `tokens`, `examples` and `epochs`."""
        keys = ("asked", "share", "tokens", "examples", "epochs")
        return {f"mixture/{source.name}/{key}": getattr(source, key) for source in self.sources for key in keys}

    def lines(self) -> list[str]:
        """A table, one line a row."""
        width = max(6, *(len(source.name) for source in self.sources))
        head = f"{'source':<{width}}  {'asked':>8}  {'share':>8}  {'tokens':>15}  {'examples':>12}  {'epochs':>7}"
        return [f"after {self.row:,} {self.counted}, shares of {self.unit}", head] + [
            f"{s.name:<{width}}  {s.asked:>8.2%}  {s.share:>8.2%}  {s.tokens:>15,}  {s.examples:>12,}  {s.epochs:>7.2f}"
            for s in self.sources
        ]

    def __str__(self) -> str:
        return "\n".join(self.lines())
