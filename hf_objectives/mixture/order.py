"""The order of a mixture: which unit of which source is drawn next, block by block, from a small state."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_objectives.mixture.feeds import NOTHING, Ahead, Feed
from hf_objectives.mixture.schedule import Schedule
from hf_objectives.mixture.weights import WeightPlan
from hf_objectives.packing import PackedRows, pack_rows
from hf_objectives.types import IGNORE_INDEX

_DRAWS = 4096  # that are ordered at a time
_ROWS_PACKED = 128  # rows of documents that are packed together: fewer leave rows half full
_CHOICES = 16  # packed rows of which the next is chosen
State = dict[str, Any]


@dataclass(frozen=True)
class Packer:
    """How drawn documents become rows, see `pack_rows`."""

    max_length: int
    strategy: str = "best_fit"
    overflow: str = "split"


@dataclass(frozen=True)
class Block:
    """Draws that were ordered together, and the rows that they make.

    Attributes:
        row, draw: rows and draws before it.
        sources: the source of each draw, int64 [draws].
        drawn: the draws, in order.
        packed: how they lie in rows; None where each is one.
        before: the state of the order before it.
    """

    row: int
    draw: int
    sources: NDArray[np.int64]
    drawn: Ahead
    packed: PackedRows | None
    before: State

    @property
    def num_rows(self) -> int:
        """Rows that it makes."""
        return len(self.drawn) if self.packed is None else len(self.packed.row_offsets) - 1

    def given(self, row: int) -> Given:
        """What each source has given from the begin of the order up to a row of this block, or its end."""
        sources = len(self.before["cursors"])
        at = np.arange(len(self.drawn))
        if self.packed is None:
            rows, draws, tokens = at, at, self.drawn.tokens
        else:
            rows = np.repeat(np.arange(self.num_rows), np.diff(self.packed.piece_offsets))
            draws, tokens = self.packed.documents, self.packed.lengths
        seen = rows < row - self.row
        # A document counts where its first piece lies; its tokens where they are.
        begun = draws[seen] if self.packed is None else np.unique(draws[seen])
        of = self.sources[begun]
        passes = np.array(self.before["given"]["passes"])
        if self.packed is None:
            np.maximum.at(passes, of, self.drawn.passes[begun])
        else:  # in no order: of what all draws of the block move a source on, the share that is given
            after = passes.copy()
            np.maximum.at(after, self.sources, self.drawn.passes)
            drawn = np.bincount(self.sources, minlength=sources)
            passes += (after - passes) * np.bincount(of, minlength=sources) / np.maximum(drawn, 1)
        before = {name: np.array(self.before["given"][name]) for name in ("amounts", "tokens", "examples")}
        amounts = np.bincount(of, self.drawn.amounts[begun], sources)
        return Given(
            before["amounts"] + amounts,
            before["tokens"] + np.bincount(self.sources[draws[seen]], tokens[seen], sources),
            before["examples"] + np.bincount(of, self.drawn.examples[begun], sources),
            passes,
        )


@dataclass(frozen=True)
class Given:
    """What each source has given up to some row, float64 [sources].

    Attributes:
        amounts: in the mixture's unit.
        tokens, examples: as they say.
        passes: passes of the source that are over.
    """

    amounts: NDArray[np.float64]
    tokens: NDArray[np.float64]
    examples: NDArray[np.float64]
    passes: NDArray[np.float64]

    def state(self) -> dict[str, list[float]]:
        """As JSON values."""
        return {name: values.tolist() for name, values in vars(self).items()}


class Order:
    """Walks the order of a mixture.

    Args:
        feeds: the sources.
        plan: their weights.
        packer: what makes rows of documents; None where each draw is a row.
        state: where another stood.
    """

    def __init__(
        self,
        feeds: Sequence[Feed],
        plan: WeightPlan,
        packer: Packer | None = None,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self._packer = packer
        self.schedule = Schedule(plan.weights, plan.pieces())
        self.row = self.draws = 0
        self._given = {name: [0.0] * len(feeds) for name in ("amounts", "tokens", "examples", "passes")}
        cursors: Sequence[Any] = [None] * len(feeds)
        if state is not None:
            self.schedule.load_state_dict(state["schedule"])
            self.row, self.draws, self._given = state["row"], state["draws"], state["given"]
            cursors = state["cursors"]
        self._cursors = [feed.start(at) for feed, at in zip(feeds, cursors, strict=True)]
        # Units that a draw counts, as far as seen; decides how far to look ahead, never the order.
        self._mean = np.ones(len(feeds))

    def state(self) -> State:
        """All that the rest depends on, as JSON values."""
        return {
            "row": self.row,
            "draws": self.draws,
            "given": self._given,
            "schedule": self.schedule.state_dict(),
            "cursors": [cursor.state() for cursor in self._cursors],
        }

    def block(self, most: int | None = None) -> Block | None:
        """The next draws, `most` (or 4,096) where each is a row; None where every source has ended."""
        for cursor in self._cursors:
            cursor.settle()
        before = self.state()
        if self._packer is None:
            sources, units = self._draw(most or _DRAWS)
        else:
            sources, units = self._draw(sys.maxsize, _ROWS_PACKED * self._packer.max_length)
        if not len(sources):
            return None
        packed = None
        if self._packer is not None:
            p = self._packer
            offsets = np.concatenate(([0], np.cumsum(units.tokens)))
            packed = pack_rows(offsets, p.max_length, strategy=p.strategy, overflow=p.overflow)
            if p.strategy != "concat":  # whose rows are in the order of the draws
                packed = packed.in_order(_balanced(packed, sources, units, self.row))
        block = Block(self.row, self.draws, sources, units, packed, before)
        self.row, self.draws = self.row + block.num_rows, self.draws + len(sources)
        self._given = block.given(self.row).state()
        return block

    def _draw(self, most: int, tokens: int = sys.maxsize) -> tuple[NDArray[np.int64], Ahead]:
        """The next draws, `most` of them, or as many as hold so many tokens; fewer where every source has ended. How far
        is looked ahead changes nothing."""
        sources, drawn = [np.empty(0, np.int64)], [NOTHING]
        while most > 0 and tokens > 0 and self.schedule.weights.any():
            known = self._ahead(min(most, _DRAWS))
            of, units = self._scheduled(known, most, tokens)
            sources.append(of)
            drawn.append(units)
            most, tokens = most - len(of), tokens - int(units.tokens.sum())
            late = self.schedule.waits_for
            if late is not None and not len(self._cursors[late].ahead(1)):
                self.schedule.retire(late)
                if sum(map(len, sources)):  # within a block, what is due changes by the weights alone
                    break
        return np.concatenate(sources), Ahead.joined(drawn)

    def _ahead(self, draws: int) -> list[Ahead]:
        """As many units of each source as it will give in so many draws, nearly; some of those whose share comes later."""
        rates = self.schedule.weights / self._mean
        counts = np.ceil(1.1 * draws * rates / rates.sum()).astype(int) + 4
        ever = self.schedule.ever
        known = [
            cursor.ahead(int(count)) if any_time else NOTHING
            for cursor, count, any_time in zip(self._cursors, counts, ever, strict=True)
        ]
        self._mean = np.array([units.amounts.mean() if len(units) else 1.0 for units in known])
        return known

    def _scheduled(self, known: Sequence[Ahead], most: int, tokens: int) -> tuple[NDArray[np.int64], Ahead]:
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

    def read(
        self, block: Block, rows: NDArray[np.int64], names: Sequence[str], *, labels: bool = False
    ) -> list[dict[str, Any]]:
        """Some rows of the block that came last, by their numbers in it; with `labels` those get some that have none."""
        if block.packed is None:
            found = self._units(block, rows)
            for row, source in zip(found, block.sources[rows].tolist(), strict=True):
                row["source"] = names[source]
                if "seq_lengths" in row:  # packed: each of its documents
                    row["sources"] = [names[source]] * len(row["seq_lengths"])
                    row |= {name: np.asarray(row[name]).tolist() for name in ("seq_lengths", "rows") if name in row}
                if labels and "labels" not in row:
                    row["labels"] = row["input_ids"]
            return found
        pieces = block.packed
        bounds = pieces.piece_offsets[:-1][rows], pieces.piece_offsets[1:][rows]
        parts = [np.arange(a, b) for a, b in zip(*(bound.tolist() for bound in bounds), strict=True)]
        documents = np.unique(pieces.documents[np.concatenate(parts)]) if parts else np.empty(0, np.int64)
        units = dict(zip(documents.tolist(), self._units(block, documents), strict=True))
        begins = pieces.starts - np.concatenate(([0], np.cumsum(block.drawn.tokens)))[pieces.documents]
        return [_packed(block, units, part, begins, names) for part in parts]

    def _units(self, block: Block, draws: NDArray[np.int64]) -> list[dict[str, Any]]:
        """The content of draws of a block."""
        found: list[dict[str, Any]] = [{}] * len(draws)
        of = block.sources[draws]
        for source in np.unique(of).tolist():
            mine = np.flatnonzero(of == source)
            rows = self._cursors[source].read(block.drawn.part(draws[mine]))
            for at, row in zip(mine.tolist(), rows, strict=True):
                found[at] = row
        return found


def _in_order(sources: NDArray[np.int64], known: Sequence[Ahead]) -> Ahead:
    """The units that are drawn, each source's in turn."""
    counts = np.bincount(sources, minlength=len(known)).tolist()
    by_source = Ahead.joined([units.part(slice(count)) for units, count in zip(known, counts, strict=True)])
    place = np.empty(len(sources), np.int64)
    place[np.argsort(sources, kind="stable")] = np.arange(len(sources))
    return by_source.part(place)


def _balanced(rows: PackedRows, sources: NDArray[np.int64], units: Ahead, seed: int) -> NDArray[np.int64]:
    """A random order of packed rows in which every source stays close to its share of them: of a few that are next at
    random, the row after which the shares so far are closest to those of all. In the order in which they were filled,
    the first rows hold more of the sources with short documents, which fill gaps."""
    count = len(rows.row_offsets) - 1
    of = np.unique(sources, return_inverse=True)[1][rows.documents]
    row = np.repeat(np.arange(count), np.diff(rows.piece_offsets))
    amounts = np.zeros((count, int(of.max()) + 1))
    np.add.at(amounts, (row, of), rows.lengths * (units.amounts / units.tokens)[rows.documents])
    away = amounts - amounts.mean(axis=0)
    waiting = np.random.default_rng(seed).permutation(count).tolist()
    ahead = np.zeros(away.shape[1])  # of what each source should have had
    order = []
    while waiting:
        few = waiting[:_CHOICES]
        best = int(np.argmin(((ahead + away[few]) ** 2).sum(axis=1)))
        order.append(waiting.pop(best))
        ahead += away[order[-1]]
    return np.array(order, np.int64)


def _packed(
    block: Block,
    units: Mapping[int, Mapping[str, Any]],
    pieces: NDArray[np.int64],
    begins: NDArray[np.int64],
    names: Sequence[str],
) -> dict[str, Any]:
    """A packed row of pieces of documents."""
    assert block.packed is not None
    row: dict[str, list[Any]] = {"input_ids": [], "labels": []}
    lengths = block.packed.lengths[pieces]
    documents = block.packed.documents[pieces].tolist()
    for document, begin, length in zip(documents, begins[pieces].tolist(), lengths.tolist(), strict=True):
        unit, part = units[document], slice(begin, begin + length)
        ids = np.asarray(unit["input_ids"][part], np.int32)
        labels = ids if unit.get("labels") is None else unit["labels"][part]
        row["input_ids"].append(ids)
        row["labels"].append(labels)
    labels = np.concatenate(row["labels"]).astype(np.int32)
    labels[np.cumsum(lengths) - lengths] = IGNORE_INDEX
    drawn = block.drawn.numbers[documents].tolist()
    return {
        "input_ids": np.concatenate(row["input_ids"]),
        "labels": labels,
        "seq_lengths": lengths.astype(np.int32),
        "sources": [names[i] for i in block.sources[documents].tolist()],
        "rows": [units[d].get("row", number) for d, number in zip(documents, drawn, strict=True)],
    }
