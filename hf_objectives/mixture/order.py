"""The order of a mixture: which unit of which source is drawn next, block by block, from a small state."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_objectives.mixture.across import Packer, packed_row
from hf_objectives.mixture.blocks import Block, State, totals_of
from hf_objectives.mixture.feeds import NOTHING, Units
from hf_objectives.mixture.row_table import Integers, gathered
from hf_objectives.mixture.stream_feed import Cursor, Feed
from hf_objectives.mixture.weights import WeightPlan
from hf_objectives.packing import document_positions
from hf_objectives.types import IGNORE_INDEX

_DRAWS = 4096  # draws that are ordered at a time
_ROWS_PACKED = 128  # rows of documents that are packed together: fewer leave rows half full


class Order:
    """Walks the order of a mixture, from its beginning or from a state. Without a packer each draw is a row."""

    def __init__(
        self, feeds: Sequence[Feed], plan: WeightPlan, packer: Packer | None = None, state: State | None = None
    ) -> None:
        self._packer = packer
        self.schedule = plan.schedule()
        self.row = self.draws = 0
        self._given = totals_of(state, len(feeds))
        places: Sequence[Any] = [None] * len(feeds)
        if state is not None:
            self.schedule.load_state_dict(state["schedule"])
            self.row, self.draws, places = state["row"], state["draws"], state["cursors"]
        self._cursors: list[Cursor] = [feed.start(place) for feed, place in zip(feeds, places, strict=True)]
        # Mean amount of a draw, as far as seen; decides how far to look ahead, never the order.
        self._mean = np.ones(len(feeds))

    def state(self) -> dict[str, Any]:
        """All that the rest of the order depends on, as JSON values."""
        return {
            "row": self.row,
            "draws": self.draws,
            "given": {name: values.tolist() for name, values in self._given.items()},
            "schedule": self.schedule.state_dict(),
            "cursors": [cursor.state() for cursor in self._cursors],
        }

    def block(self, most: int | None = None) -> Block | None:
        """The next draws, `most` (or 4,096) where each is a row; None where every source has ended."""
        before = self.state()
        if self._packer is None:
            sources, units = self._draw(most or _DRAWS)
        else:
            sources, units = self._draw(sys.maxsize, _ROWS_PACKED * self._packer.max_length)
        if not len(sources):
            return None
        packed = None if self._packer is None else self._packer.pack(sources, units, self.row)
        block = Block(sources, units, packed, before)
        self.row, self.draws = block.end, self.draws + len(sources)
        self._given = block.totals(self.row)
        return block

    def _draw(self, most: int, tokens: int = sys.maxsize) -> tuple[Integers, Units]:
        """The next draws: `most`, or as many as hold this many tokens. How far is looked ahead changes nothing."""
        sources, drawn = [np.empty(0, np.int64)], [NOTHING]
        while most > 0 and tokens > 0 and self.schedule.weights.any():
            known = self._ahead(min(most, _DRAWS))
            some, units = self._scheduled(known, most, tokens)
            sources.append(some)
            drawn.append(units)
            most, tokens = most - len(some), tokens - int(units.tokens.sum())
            late = self.schedule.waits_for
            if late is not None and not len(self._cursors[late].ahead(1)):
                self.schedule.retire(late)
                if sum(map(len, sources)):  # within a block, what is due changes by the weights alone
                    break
        return np.concatenate(sources), Units.joined(drawn)

    def _ahead(self, draws: int) -> list[Units]:
        """About as many units of each source as it will give in this many draws, and a few more."""
        rates = self.schedule.weights / self._mean
        counts = np.ceil(1.1 * draws * rates / rates.sum()).astype(int) + 4
        known = [
            cursor.ahead(int(count)) if ever else NOTHING
            for cursor, count, ever in zip(self._cursors, counts, self.schedule.ever, strict=True)
        ]
        self._mean = np.array([units.amounts.mean() if len(units) else 1.0 for units in known])
        return known

    def _scheduled(self, known: Sequence[Units], most: int, tokens: int) -> tuple[Integers, Units]:
        """Draws among units that are known, taken from their sources."""
        sizes = [units.amounts for units in known]
        before = self.schedule.state_dict()
        sources = self.schedule.draw(sizes, most)
        units = _in_order(sources, known)
        enough = int(np.searchsorted(np.cumsum(units.tokens), tokens)) + 1 if tokens < sys.maxsize else sys.maxsize
        if enough < len(sources):
            self.schedule.load_state_dict(before)
            sources = self.schedule.draw(sizes, enough)
            units = units.part(slice(enough))
        for i in np.unique(sources).tolist():
            self._cursors[i].advance(units.part(sources == i))
        return sources, units

    def read(self, block: Block, rows: Integers, names: Sequence[str], *, labels: bool = False) -> list[dict[str, Any]]:
        """Rows of the last block, by their numbers in it; `labels` gives labels to those that have none."""
        if block.packed is None:
            found = self._units(block, rows)
            for row, source in zip(found, block.sources[rows].tolist(), strict=True):
                _name_source(row, names[source])
                if "labels" in row or labels:
                    row["labels"] = labels_of(row)
            return found
        packed, bounds = block.packed, block.packed.piece_offsets
        pieces = [np.arange(a, b) for a, b in zip(bounds[rows].tolist(), bounds[rows + 1].tolist(), strict=True)]
        if not pieces:
            return []
        documents = np.unique(packed.documents[np.concatenate(pieces)])
        units = dict(zip(documents.tolist(), self._units(block, documents), strict=True))
        sources = block.sources[packed.documents]
        begins = packed.starts - (np.cumsum(block.drawn.tokens) - block.drawn.tokens)[packed.documents]
        return [
            packed_row(packed, begins, part, units, block.drawn.numbers, [names[i] for i in sources[part].tolist()])
            for part in pieces
        ]

    def _units(self, block: Block, draws: Integers) -> list[dict[str, Any]]:
        """The content of draws of a block."""
        drawn = block.drawn.part(draws)
        return gathered(block.sources[draws], lambda i, chosen: self._cursors[i].read(drawn.part(chosen)))


def labels_of(row: Mapping[str, Any]) -> NDArray:
    """The labels of a row, or its ids where it has none; of no document's first token, which nothing predicts."""
    places = np.asarray(row.get("position_ids", range(len(row["input_ids"]))))
    return np.where(places == 0, IGNORE_INDEX, row.get("labels", row["input_ids"]))


def _name_source(row: dict[str, Any], name: str) -> None:
    """Give a row the name of its source; a packed one for each of its documents too."""
    row["source"] = name
    if "seq_lengths" in row:
        row["sources"] = [name] * len(row["seq_lengths"])
        row |= {column: np.asarray(row[column]).tolist() for column in ("seq_lengths", "rows") if column in row}
        if "position_ids" not in row:
            row["position_ids"] = document_positions(row["seq_lengths"])


def _in_order(sources: Integers, known: Sequence[Units]) -> Units:
    """The units that are drawn, each source's in turn."""
    counts = np.bincount(sources, minlength=len(known)).tolist()
    by_source = Units.joined([units.part(slice(count)) for units, count in zip(known, counts, strict=True)])
    place = np.empty(len(sources), np.int64)
    place[np.argsort(sources, kind="stable")] = np.arange(len(sources))
    return by_source.part(place)
