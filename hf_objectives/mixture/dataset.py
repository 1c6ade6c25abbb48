"""Several sources as one stream of rows, each source with its share at every moment."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from hf_objectives.errors import ConfigError
from hf_objectives.mixture.across import Packer
from hf_objectives.mixture.blocks import Block, Journal, State, totals_of
from hf_objectives.mixture.feeds import MappedFeed
from hf_objectives.mixture.order import Order
from hf_objectives.mixture.report import MixtureReport, SourceReport
from hf_objectives.mixture.stream_feed import Feed
from hf_objectives.mixture.weights import WeightPlan
from hf_objectives.preparation import OrderedStream
from hf_objectives.types import Row

logger = logging.getLogger(__name__)
_READ = 256  # rows that are read at a time; of packed ones as many as hold this many tokens:
_TOKENS_READ = 1 << 19
_KEPT_EVERY = 1 << 18  # draws between the states from which a row or draw is looked up
MANY_EPOCHS = 4.0  # beyond, repeated data is worth less and less (Muennighoff et al., arXiv 2305.16264)


@dataclass(frozen=True, slots=True)
class Draw:
    """One draw of a mixture. `row` is what rows carry under this name, else the number of the row."""

    source: str
    epoch: int
    row: int


class DatasetMixture(OrderedStream):
    """Rows of several sources, without an end unless every source has one (`max_epochs`).

    After any number of draws every source has had its share to within one draw (of its own, or the largest of another),
    counted in the mixture's unit. Each epoch of a source is a new permutation. The order is a pure function of the
    configuration, the seed and the number of the draw. A state does not grow, and resumes at the next row at once, under
    any number of ranks and loader workers.

    Made by `build_mixture`. A `train_dataset` of `PerplexityTrainer`, which carries its state in checkpoints and reports
    shares in its logs; to transformers' Trainer add `OrderedStreamCallback`. In a DataLoader with workers set `batch_rows`
    to the batch size, so that workers take turns by batches.

    Attributes:
        names, plan: the sources and their weights.
        unit: what weights count: "tokens", "supervised" (trained tokens), "examples" or "rows".
        blocklist: numbers of rows that are never drawn, by source.
        eval_dataset: what is held out of the sources.
        notes: notes about the configuration, for the user.

    Yields (on iteration): the sources' rows with `source`, the name; packed across sources `input_ids`, `labels` (int32
    [tokens]), `seq_lengths`, `sources` and `rows`. At an end, rows that do not fill `batch_rows` are left out, with a line
    in the log.
    """

    def __init__(
        self,
        feeds: Sequence[Feed],
        plan: WeightPlan,
        *,
        unit: str,
        fingerprint: Mapping[str, Any],
        blocklist: Mapping[str, Sequence[int]],
        packer: Packer | None = None,
        labels: bool = False,
        eval_dataset: Dataset | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        self.feeds, self.plan, self.unit, self.notes = list(feeds), plan, unit, list(notes)
        self.eval_dataset, self.blocklist = eval_dataset, blocklist
        self._fingerprint, self._packer, self._labels = dict(fingerprint), packer, labels
        self._resumed: State | None = None
        self._journal = None if self.is_mapped else Journal()
        self._walk: tuple[Order, Block | None] | None = None
        self._kept: dict[int, State] = {}
        self._asked_for: int | None = None

    @property
    def names(self) -> list[str]:
        """Names of the sources."""
        return [feed.name for feed in self.feeds]

    @property
    def is_mapped(self) -> bool:
        """Whether every source can be looked up, none being a stream."""
        return all(isinstance(feed, MappedFeed) for feed in self.feeds)

    # -- reading -------------------------------------------------------------------------------------------------

    def rows(self, begin: int, end: int) -> Iterator[Row]:
        """Yield rows `begin` to `end` of the order; fewer where it ends."""
        for found in self._read([range(begin, end)]):
            yield from found

    def read_turns(self, turns: Iterable[range]) -> Iterator[Row]:
        """Yield the rows of ascending ranges; what does not fill `batch_rows` at the end is left out."""
        for found in self._read(turns):
            together = self.batch_rows or 1
            whole = len(found) - len(found) % together
            if whole < len(found):
                logger.warning(
                    "the mixture ends: %d rows that do not fill %d, which all ranks take together, are left out",
                    *(len(found) - whole, together),
                )
            yield from found[:whole]

    def _read(self, turns: Iterable[range]) -> Iterator[list[Row]]:
        order = self._order(self._resumed)
        block = self._next(order)
        most = _READ if self._packer is None else max(1, _TOKENS_READ // self._packer.max_length)
        for turn in turns:
            found: list[Row] = []
            row = turn.start
            while row < turn.stop:
                while block is not None and row >= block.end:
                    block = self._next(order)
                if block is None:
                    break
                end = min(turn.stop, block.end, row + most)
                found += order.read(block, np.arange(row - block.row, end - block.row), self.names, labels=self._labels)
                row = end
            if block is None:
                self._check_end(order.row)
            yield found
            if block is None:
                return

    def _order(self, state: State | None = None) -> Order:
        return Order(self.feeds, self.plan, self._packer, state)

    def _next(self, order: Order) -> Block | None:
        """The next block, written down for the process that trains."""
        block = order.block()
        if block is not None and self._journal is not None:
            self._journal.write(block)
        return block

    # -- state ---------------------------------------------------------------------------------------------------

    def state_dict(self, rows_taken: int | None = None) -> dict[str, Any]:
        """The state to resume from, as JSON values; some hundred bytes a source, at any row. See `OrderedStream`."""
        place = super().state_dict(rows_taken)
        return {**place, "mixture": self._fingerprint, "order": self._before(place["row"])}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Begin the next iteration at the row of a state. Nothing before it is read again, except a buffer of each stream.

        Raises:
            ConfigError: the state is not one of a mixture, or is one of another mixture; says what differs.
        """
        super().load_state_dict(state)
        if not isinstance(state.get("mixture"), Mapping) or "order" not in state:
            raise ConfigError("the state is not one of a mixture; it was made on other data")
        if different := _difference(state["mixture"], self._fingerprint):
            raise ConfigError(f"the state is of another mixture: {'; '.join(different)}")
        self._resumed, self._walk = state["order"], None
        self._kept = {-1: self._resumed} if self._resumed else {}

    def _before(self, row: int) -> State | None:
        """A state of the order from which this row is soon reached; None for the beginning."""
        block = self._block_of(row)
        if block is None:
            return self._resumed
        if self._packer is not None or self._journal is not None:
            return block.before
        order = self._order(block.before)
        if row > block.row:
            order.block(row - block.row)
        return order.state()

    def _block_of(self, row: int) -> Block | None:
        """The block with a row; the last one at the end, None at the beginning of a stream that nobody has read."""
        if self._journal is not None:
            block = self._journal.find(row)
            if block is None and row != self._begin:
                raise ConfigError(
                    f"row {row:,} of a mixture with streams was not read here; it goes on at {self._begin:,}"
                )
            return block
        return self._walk_to("row", row)[1]

    def _walk_to(self, counted: Literal["row", "draws"], n: int) -> tuple[Order, Block | None]:
        """The order behind the block that holds row or draw n, and the block: the last one where the order ends before."""
        order, block = self._walk or (None, None)
        self._walk = None  # an interrupt in between would leave an order that is ahead of its block
        if order is None or block is None or n < block.before[counted]:
            before = [state for state in self._kept.values() if state[counted] <= n]
            order = self._order(max(before, key=lambda state: state[counted], default=None))
            block = order.block()
        while block is not None and n >= getattr(order, counted):
            following = order.block()
            if following is None:
                break
            block = following
            self._kept.setdefault(block.before["draws"] // _KEPT_EVERY, block.before)
        self._walk = order, block
        return order, block

    # -- what happens --------------------------------------------------------------------------------------------

    def at(self, n: int) -> Draw:
        """Draw n of the order: packed across sources the n-th document, else row n.

        Raises:
            ConfigError: the mixture has a stream, which cannot be looked up, or ends before n.
        """
        for feed in self.feeds:
            if not isinstance(feed, MappedFeed):
                raise ConfigError(f"source {feed.name!r} is a stream, whose rows cannot be looked up")
        order, block = self._walk_to("draws", n)
        if block is None or n >= order.draws:
            raise ConfigError(
                f"the mixture has {order.draws:,} draws, then every source has reached its max_epochs; asked for {n:,}"
            )
        i = n - block.before["draws"]
        feed = self.feeds[int(block.sources[i])]
        assert isinstance(feed, MappedFeed)
        return Draw(feed.name, int(block.drawn.epochs[i]), feed.row_id(int(block.drawn.numbers[i])))

    def report(self, rows_taken: int | None = None) -> MixtureReport:
        """Report shares asked for and given, tokens, examples and epochs by source; see `state_dict`."""
        row = self._begin if rows_taken is None else rows_taken
        block = self._block_of(row)
        before = self._resumed if block is None else block.before
        totals, schedule = totals_of(before, len(self.feeds)), self.plan.schedule()
        if block is not None:
            row = min(row, block.end)  # where the mixture ends
            totals = block.totals(row)
        elif before is not None:  # of a stream that was not read since, what the state knows
            row = before["row"]
        if before is not None:
            schedule.load_state_dict(before["schedule"])
        drawn = totals["amounts"].sum()
        asked = schedule.due_at(drawn) if drawn else self.plan.weights
        share = totals[self.unit if self.unit in ("tokens", "examples") else "amounts"]
        counts = [totals[name].astype(int) for name in ("tokens", "examples")]
        columns = (asked / max(asked.sum(), 1e-300), share / max(share.sum(), 1e-300), *counts, totals["passes"])
        return MixtureReport(row, self.unit, list(map(SourceReport, self.names, *(c.tolist() for c in columns))))

    def metrics(self, rows_taken: int) -> dict[str, float]:
        """What a training log says about the rows up to this one, see `MixtureReport.metrics`."""
        return self.report(rows_taken).metrics()

    def expect(self, rows: int) -> list[str]:
        """The sources that will be repeated more than four times in this many rows, a line each.

        Raises:
            ConfigError: every source has `max_epochs`, and they end before.
        """
        self._asked_for = rows
        if self.is_mapped and self._may_end():
            self._check_end(self._walk_to("row", rows - 1)[0].row)
        return [
            f"source {name!r} will be repeated {epochs:.1f} times in {rows:,} rows; beyond {MANY_EPOCHS:g} epochs repeated "
            "data teaches less and less: lower its weight, give it max_epochs, or add data"
            for name, epochs in self.expected_epochs(rows).items()
            if epochs > MANY_EPOCHS
        ]

    def first_rows(self) -> tuple[int, int]:
        """How many rows the first block of draws makes, and how many tokens those hold."""
        block = self._order().block()
        assert block is not None  # sources are not empty
        return block.num_rows, int(block.drawn.tokens.sum())

    def expected_epochs(self, rows: int) -> dict[str, float]:
        """Nearly the epochs of each source after this many rows; empty where a source is a stream of unknown size."""
        block = self._block_of(self._begin) if self.is_mapped else None
        if block is None:
            return {}
        sizes = np.array([feed.epoch_size() for feed in self.feeds], float)
        most = sizes * [feed.max_epochs or np.inf for feed in self.feeds]
        per_epoch = [feed.size if self._packer is None else feed.tokens for feed in self.feeds]
        per_row = 1.0 if self._packer is None else block.drawn.tokens.sum() / block.num_rows
        rows_of_unit = np.array(per_epoch, float) / sizes / per_row
        schedule = self.plan.schedule()
        low, high = 0.0, rows / rows_of_unit.min()  # units drawn in all, between which this many rows are reached
        for _ in range(60):
            middle = (low + high) / 2
            given = _capped(schedule.due_at(middle), most)
            low, high = (middle, high) if given @ rows_of_unit < rows else (low, middle)
        return dict(zip(self.names, (_capped(schedule.due_at(high), most) / sizes).tolist(), strict=True))

    def _may_end(self) -> bool:
        """Whether at some time all sources with a weight have `max_epochs`."""
        endless = [feed.max_epochs is None for feed in self.feeds]
        return any(not weights[endless].any() for weights in (self.plan.weights, *(w for _, w in self.plan.pieces())))

    def _check_end(self, row: int) -> None:
        if self._asked_for is not None and row < self._asked_for:
            ends = ", ".join(f"{feed.name} {feed.max_epochs:g}" for feed in self.feeds if feed.max_epochs)
            raise ConfigError(
                f"every source with a weight reaches its max_epochs after {row:,} rows, and the run takes "
                f"{self._asked_for:,}; raise max_epochs ({ends}), add a source, or train for less"
            )


def _capped(due: NDArray[np.float64], most: NDArray[np.float64]) -> NDArray[np.float64]:
    """What is due to each source, where what exceeds the most that it has goes to the others in proportion."""
    while (over := np.maximum(due - most, 0).sum()) > 1e-9 * due.sum():
        free = np.where(due < most, due, 0)
        if not free.any():
            break
        due = np.minimum(due, most) + over * free / free.sum()
    return np.minimum(due, most)


def _difference(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """What two mixtures disagree on, one line each."""
    lines = []
    for key in dict.fromkeys([*expected, *found]):
        there, here = found.get(key), expected.get(key)
        if isinstance(there, Mapping) and isinstance(here, Mapping):
            differs = [name for name in dict.fromkeys([*here, *there]) if there.get(name) != here.get(name)]
            lines += [
                f"{key} of {name!r}: {there.get(name, 'missing')} there, {here.get(name, 'missing')} here"
                for name in differs
            ]
        elif there != here:
            lines.append(f"{key}: {there} there, {here} here")
    return lines
