"""Sources that are looked up by number: a mapped dataset, and a prepared folder."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from hf_objectives.errors import ConfigError, DataError
from hf_objectives.mixture.feeds import Integers, MappedFeed
from hf_objectives.mixture.permutation import permuted
from hf_objectives.mixture.row_table import INTEGERS, RowList, RowTable
from hf_objectives.preparation import PreparedStream
from hf_objectives.types import IGNORE_INDEX


class TableFeed(MappedFeed):
    """A mapped dataset. Each epoch is a permutation of its rows; see `MappedFeed`.

    Args:
        name: its name.
        table: the rows. Tokens are counted where rows have `input_ids`. Where rows are packed (`seq_lengths`), the
            documents in them are the examples.
        unit: what the mixture counts, one of `UNITS`.
        seed: seed of the permutations.
        max_epochs: see `MappedFeed`.
        longest: tokens of a row that count at most, where longer ones are cut; None for all.
        blocked: numbers of documents that are never drawn: the `row` of a row, or its number where it has none. Of packed
            rows only the blocked documents go.
        left_out: numbers of rows that are not drawn either.
        ids: int64 [rows], numbers in the source where the table holds some of its rows only.

    Raises:
        ConfigError: tokens are to be counted, and there are no `input_ids`.
        DataError: a row has no token, or no trained token where these are counted.
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
        left_out: Collection[int] = (),
        ids: Integers | None = None,
    ) -> None:
        self.table, self._ids, self._seed = table, ids, seed
        self._documents = frozenset(blocked) if "rows" in table.names else frozenset[int]()
        gone = blocked_rows(table, blocked, ids) if blocked else np.empty(0, np.int64)
        super().__init__(
            name, len(table), max_epochs=max_epochs, blocked=np.concatenate([gone, np.array([*left_out], np.int64)])
        )
        self._measure(unit, longest)

    def _measure(self, unit: str, longest: int | None) -> None:
        """Set the tokens, examples and amount of each row; None where each counts one, or has no tokens."""
        table, name = self.table, self.name
        kind = table.types().get("input_ids", "")
        if kind not in ("", INTEGERS):
            raise ConfigError(f"source {name!r}: input_ids are {kind}; expected lists of token ids")
        sizes = table.lengths("input_ids") if "input_ids" in table.names else None
        tokens = sizes if sizes is None or longest is None else np.minimum(sizes, longest)
        if tokens is not None and not tokens.all():
            raise DataError("no token; expected one at least", source=name, row=int(np.argmin(tokens)))
        if sizes is not None and "labels" in table.names and (wrong := table.lengths("labels") != sizes).any():
            raise DataError("labels and input_ids have different lengths", source=name, row=int(np.argmax(wrong)))
        examples = table.lengths("seq_lengths") if "seq_lengths" in table.names else None
        amounts = {"rows": None, "examples": examples}.get(unit, tokens)
        if unit in ("tokens", "supervised") and tokens is None:
            raise ConfigError(
                f"source {name!r} has columns {', '.join(table.names)} and no input_ids, so that its {unit} cannot be "
                "counted; give build_mixture a tokenizer, or unit='examples'"
            )
        if unit == "supervised" and "labels" in table.names:
            amounts = table.counts("labels", lambda labels: labels != IGNORE_INDEX)
            if not amounts.all():
                raise DataError("no token is trained; expected one at least", source=name, row=int(np.argmin(amounts)))
        self.tokens = None if tokens is None else int(tokens.sum())
        self._tokens, self._examples, self._amounts = tokens, examples, amounts

    def places(self, begin: int, end: int) -> tuple[Integers, Integers]:
        """See `MappedFeed`."""
        size = len(self.table)
        epochs, within = np.divmod(np.arange(begin, end), size)
        numbers = np.empty_like(within)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            chosen = epochs == epoch
            numbers[chosen] = permuted(within[chosen], size, (self._seed, zlib.crc32(self.name.encode()), epoch))
        return epochs, numbers

    def measures(self, numbers: Integers) -> tuple[Integers, Integers, Integers]:
        """See `MappedFeed`."""
        ones = np.ones(len(numbers), np.int64)
        tokens = 0 * ones if self._tokens is None else self._tokens[numbers]
        examples = ones if self._examples is None else self._examples[numbers]
        return ones if self._amounts is None else self._amounts[numbers], tokens, examples

    def content(self, numbers: Integers) -> list[dict[str, Any]]:
        """See `MappedFeed`."""
        rows = self.table.read(numbers)
        return [without(row, self._documents) for row in rows] if self._documents else rows

    def row_id(self, number: int) -> int:
        """See `MappedFeed`."""
        known = number if self._ids is None else int(self._ids[number])
        return int(self.table.read(np.array([number]))[0].get("row", known))

    def epoch_size(self) -> int:
        """See `Feed`."""
        return len(self.table) if self._amounts is None else int(self._amounts.sum())


class PreparedFeed(MappedFeed):
    """Shards of a prepared folder in the order of a `PreparedStream`, which reads row groups whole; see `MappedFeed`.

    Args:
        name: its name.
        stream: the shards.
        tokens: tokens in them.
        unit: "tokens", "examples" or "rows".
        max_epochs: see `MappedFeed`.
        blocked: numbers of documents that are cut out of their rows.

    Raises:
        ConfigError: the unit is another one.
    """

    def __init__(
        self,
        name: str,
        stream: PreparedStream,
        *,
        tokens: int,
        unit: str,
        max_epochs: float | None,
        blocked: Collection[int] = (),
    ) -> None:
        if unit == "supervised":
            raise ConfigError(
                f"source {name!r}: trained tokens of prepared rows are not known without reading them; "
                "expected unit 'tokens', 'examples' or 'rows'"
            )
        self.stream, self._documents, self._unit = stream, frozenset(blocked), unit
        self._starts = np.concatenate(([0], np.cumsum(stream.group_sizes)))
        gone = [np.empty(0, np.int64)]
        for group in range(len(stream.group_sizes) if blocked else 0):
            rows, offsets = stream.columns(group, ["rows"])["rows"]
            gone.append(self._starts[group] + _blocked_whole(rows, offsets, blocked))
        super().__init__(name, stream.num_rows, max_epochs=max_epochs, blocked=np.concatenate(gone))
        self.tokens = tokens
        self._sizes = lru_cache(maxsize=64)(self._group_sizes)

    def places(self, begin: int, end: int) -> tuple[Integers, Integers]:
        """See `MappedFeed`."""
        epochs, groups, rows = self.stream.order(begin, end)
        return epochs, self._starts[groups] + rows

    def measures(self, numbers: Integers) -> tuple[Integers, Integers, Integers]:
        """See `MappedFeed`."""
        tokens, examples = np.empty_like(numbers), np.empty_like(numbers)
        groups = np.searchsorted(self._starts, numbers, "right") - 1
        for group in np.unique(groups).tolist():
            chosen = groups == group
            rows = numbers[chosen] - self._starts[group]
            tokens[chosen], examples[chosen] = (sizes[rows] for sizes in self._sizes(group))
        amounts = {"tokens": tokens, "examples": examples, "rows": np.ones_like(numbers)}[self._unit]
        return amounts, tokens, examples

    def _group_sizes(self, group: int) -> tuple[Integers, Integers]:
        """Tokens and documents of the rows of a row group."""
        lengths, offsets = self.stream.columns(group, ["seq_lengths"])["seq_lengths"]
        ends = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
        return np.diff(ends[offsets]), np.diff(offsets)

    def content(self, numbers: Integers) -> list[dict[str, Any]]:
        """See `MappedFeed`."""
        groups = np.searchsorted(self._starts, numbers, "right") - 1
        places = zip(groups.tolist(), (numbers - self._starts[groups]).tolist(), strict=True)
        rows = [self.stream.row(group, row) for group, row in places]
        return [without(row, self._documents) for row in rows] if self._documents else rows

    def epoch_size(self) -> int:
        """See `Feed`."""
        if self._unit == "tokens":
            assert self.tokens is not None
            return self.tokens
        if self._unit == "rows":
            return self.stream.num_rows
        return sum(int(self._sizes(group)[1].sum()) for group in range(len(self.stream.group_sizes)))

    def __getstate__(self) -> Mapping[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_sizes"}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)
        self._sizes = lru_cache(maxsize=64)(self._group_sizes)


# -- blocklists ------------------------------------------------------------------------------------------------------


def blocked_rows(table: RowTable | RowList, blocked: Collection[int], ids: Integers | None = None) -> Integers:
    """Rows of a table of which nothing is left when documents are blocked."""
    if "rows" in table.names:
        rows = table.column("rows").combine_chunks()
        offsets = rows.offsets.to_numpy().astype(np.int64)
        return _blocked_whole(rows.flatten().to_numpy(), offsets - offsets[0], blocked)
    if "row" in table.names:
        ids = table.column("row").to_numpy()
    if ids is not None:
        return np.flatnonzero(np.isin(ids, list(blocked)))
    numbers = np.array(sorted(blocked))
    return numbers[numbers < len(table)]


def _blocked_whole(rows: Any, offsets: Integers, blocked: Collection[int]) -> Integers:
    """Packed rows of which every document is blocked, by the numbers of the documents and where each row begins."""
    free = np.concatenate(([0], np.cumsum(~np.isin(rows, list(blocked)))))
    return np.flatnonzero(np.diff(free[offsets]) == 0)


def without(row: Mapping[str, Any], blocked: Collection[int]) -> dict[str, Any]:
    """A packed row without the documents whose numbers are blocked."""
    keep = np.array([number not in blocked for number in row["rows"]])
    if keep.all():
        return dict(row)
    tokens = np.repeat(keep, row["seq_lengths"])
    lists = {name: np.asarray(row[name])[keep].tolist() for name in ("rows", "sources", "seq_lengths") if name in row}
    arrays = {name: np.asarray(row[name])[tokens] for name in ("input_ids", "labels") if name in row}
    return {**row, **arrays, **lists}
