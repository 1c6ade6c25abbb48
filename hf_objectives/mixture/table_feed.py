"""A mapped dataset as a source of a mixture."""

from __future__ import annotations

import zlib
from collections.abc import Collection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_objectives.errors import ConfigError, DataError
from hf_objectives.mixture.blocklist import blocked_whole, without
from hf_objectives.mixture.feeds import MappedFeed
from hf_objectives.mixture.permutation import permuted
from hf_objectives.mixture.row_table import INTEGERS, RowList, RowTable
from hf_objectives.types import IGNORE_INDEX


class TableFeed(MappedFeed):
    """A mapped dataset. Passes are permutations of its rows; see `MappedFeed`.

    Args:
        name: its name.
        table: the rows. Where they have `input_ids` tokens are counted, where they have `seq_lengths` (packed rows) the
            documents in them are examples.
        unit: what the mixture counts, one of `UNITS`.
        longest: tokens of a row that count at most, where longer ones are cut; None for all.
        blocked: numbers of documents that are never drawn: the `row` of a row, its number where it has none, and the
            `rows` of packed ones, of which the others stay.
        left_out: numbers of rows that are not drawn either.
        ids: int64 [rows], numbers in the source where the table holds some of its rows only.

    Raises:
        ConfigError: tokens are to be counted, and there are no `input_ids`.
        DataError: a row without a token.
    """

    def __init__(
        self,
        name: str,
        table: RowTable | RowList,
        *,
        unit: str,
        seed: int,
        max_epochs: float | None,
        longest: int | None = None,
        blocked: Collection[int] = (),
        left_out: NDArray[np.int64] | None = None,
        ids: NDArray[np.int64] | None = None,
    ) -> None:
        self.table, self._ids = table, ids
        self._pieces = frozenset(blocked) if "rows" in table.names else frozenset[int]()
        gone = [numbers_of(table, blocked, ids)] if blocked else []
        gone += [] if left_out is None else [left_out]
        super().__init__(
            name, len(table), seed=seed, max_epochs=max_epochs, blocked=np.concatenate(gone) if gone else None
        )
        kind = table.types().get("input_ids", "")
        if kind not in ("", INTEGERS):
            raise ConfigError(f"source {name!r}: input_ids are {kind}; expected lists of token ids")
        self._tokens = table.lengths("input_ids") if "input_ids" in table.names else None
        if self._tokens is not None:
            if longest is not None:
                self._tokens = np.minimum(self._tokens, longest)
            if not self._tokens.all():
                raise DataError("no token; expected one at least", source=name, row=int(np.argmin(self._tokens)))
        if "labels" in table.names and self._tokens is not None:
            wrong = np.flatnonzero(table.lengths("labels") != table.lengths("input_ids"))
            if len(wrong):
                raise DataError("labels and input_ids have different lengths", source=name, row=int(wrong[0]))
        self._examples = table.lengths("seq_lengths") if "seq_lengths" in table.names else None
        self._amounts = _amounts(name, table, unit, self._tokens, self._examples)
        self.tokens = None if self._tokens is None else int(self._tokens.sum())

    def places(self, begin: int, end: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """See `MappedFeed`."""
        assert self.size is not None
        epochs, within = np.divmod(np.arange(begin, end), self.size)
        numbers = np.empty_like(within)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            some = epochs == epoch
            numbers[some] = permuted(within[some], self.size, (self._seed, zlib.crc32(self.name.encode()), epoch))
        return epochs, numbers

    def measures(self, numbers: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """See `MappedFeed`."""
        ones = np.ones(len(numbers), np.int64)
        tokens = np.zeros(len(numbers), np.int64) if self._tokens is None else self._tokens[numbers]
        examples = ones if self._examples is None else self._examples[numbers]
        return ones if self._amounts is None else self._amounts[numbers], tokens, examples

    def content(self, numbers: NDArray[np.int64]) -> list[dict[str, Any]]:
        """See `MappedFeed`."""
        rows = self.table.read(numbers)
        return [without(row, self._pieces) for row in rows] if self._pieces else rows

    def row_id(self, number: int) -> int:
        """See `MappedFeed`."""
        known = number if self._ids is None else int(self._ids[number])
        return int(self.table.read(np.array([number]))[0].get("row", known))

    def about(self) -> Any:
        """See `Feed`."""
        return [self.size, self.tokens]

    def pass_size(self) -> int:
        """See `Feed`."""
        return len(self.table) if self._amounts is None else int(self._amounts.sum())


def _amounts(
    name: str,
    table: RowTable | RowList,
    unit: str,
    tokens: NDArray[np.int64] | None,
    examples: NDArray[np.int64] | None,
) -> NDArray[np.int64] | None:
    """What each row counts; None for one each."""
    if unit == "rows":
        return None
    if unit == "examples":
        return examples
    if tokens is None:
        raise ConfigError(
            f"source {name!r} has columns {', '.join(table.names)} and no input_ids, so that its {unit} cannot be "
            "counted; give build_mixture a tokenizer, or unit='examples'"
        )
    if unit == "tokens" or "labels" not in table.names:
        return tokens
    supervised = table.counts("labels", lambda labels: labels != IGNORE_INDEX)
    if not supervised.all():
        raise DataError("no token is trained; expected one at least", source=name, row=int(np.argmin(supervised)))
    return supervised


def numbers_of(
    table: RowTable | RowList, blocked: Collection[int], ids: NDArray[np.int64] | None = None
) -> NDArray[np.int64]:
    """Rows of a table of which nothing is left when documents are blocked."""
    if "rows" in table.names:
        rows = table.column("rows").combine_chunks()
        offsets = rows.offsets.to_numpy().astype(np.int64)
        return blocked_whole(rows.flatten().to_numpy(), offsets - offsets[0], blocked)
    if "row" in table.names:
        return np.flatnonzero(np.isin(table.column("row").to_numpy(), list(blocked)))
    if ids is not None:
        return np.flatnonzero(np.isin(ids, list(blocked)))
    numbers = np.array(sorted(blocked))
    return numbers[numbers < len(table)]
