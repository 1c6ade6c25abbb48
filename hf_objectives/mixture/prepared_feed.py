"""A prepared folder as a source of a mixture."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_objectives.errors import ConfigError
from hf_objectives.mixture.blocklist import blocked_whole, without
from hf_objectives.mixture.feeds import MappedFeed
from hf_objectives.preparation import PreparedStream


class PreparedFeed(MappedFeed):
    """Shards of a prepared folder in the order of a `PreparedStream`, which reads row groups whole; see `MappedFeed`.

    Args:
        name: its name.
        stream: the shards.
        tokens: tokens in them.
        unit: "tokens", "examples" or "rows".
        blocked: numbers of documents that are cut out of their rows.

    Raises:
        ConfigError: another unit.
    """

    def __init__(
        self,
        name: str,
        stream: PreparedStream,
        *,
        tokens: int,
        unit: str,
        seed: int,
        max_epochs: float | None,
        blocked: Collection[int] = (),
    ) -> None:
        if unit == "supervised":
            raise ConfigError(
                f"source {name!r}: trained tokens of prepared rows are not known without reading them; "
                "expected unit 'tokens', 'examples' or 'rows'"
            )
        self.stream, self._pieces, self._unit = stream, frozenset(blocked), unit
        self._starts = np.concatenate(([0], np.cumsum(stream.group_sizes)))
        super().__init__(
            name, stream.num_rows, seed=seed, max_epochs=max_epochs, blocked=self._whole() if blocked else None
        )
        self.tokens = tokens
        self._sizes = lru_cache(maxsize=64)(self._group_sizes)

    def places(self, begin: int, end: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """See `MappedFeed`."""
        epochs, groups, rows = self.stream.order(begin, end)
        return epochs, self._starts[groups] + rows

    def measures(self, numbers: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """See `MappedFeed`."""
        tokens, examples = np.empty_like(numbers), np.empty_like(numbers)
        groups = np.searchsorted(self._starts, numbers, "right") - 1
        for group in np.unique(groups).tolist():
            mine = groups == group
            rows = numbers[mine] - self._starts[group]
            tokens[mine], examples[mine] = (sizes[rows] for sizes in self._sizes(group))
        amounts = {"tokens": tokens, "examples": examples, "rows": np.ones_like(numbers)}[self._unit]
        return amounts, tokens, examples

    def _group_sizes(self, group: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Tokens and documents of the rows of a row group."""
        lengths, offsets = self.stream.columns(group, ["seq_lengths"])["seq_lengths"]
        ends = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
        return np.diff(ends[offsets]), np.diff(offsets)

    def content(self, numbers: NDArray[np.int64]) -> list[dict[str, Any]]:
        """See `MappedFeed`."""
        groups = np.searchsorted(self._starts, numbers, "right") - 1
        rows = [
            self.stream.row(group, row)
            for group, row in zip(groups.tolist(), (numbers - self._starts[groups]).tolist(), strict=True)
        ]
        return [without(row, self._pieces) for row in rows] if self._pieces else list(rows)

    def _whole(self) -> NDArray[np.int64]:
        """Rows of which every document is blocked."""
        found = [
            self._starts[group] + blocked_whole(*self.stream.columns(group, ["rows"])["rows"], self._pieces)
            for group in range(len(self._starts) - 1)
        ]
        return np.concatenate(found)

    def about(self) -> Any:
        """See `Feed`."""
        return [self.size, self.tokens]

    def pass_size(self) -> int:
        """See `Feed`."""
        if self._unit == "tokens":
            assert self.tokens is not None
            return self.tokens
        if self._unit == "rows":
            return self.stream.num_rows
        return sum(int(self._sizes(group)[1].sum()) for group in range(len(self._starts) - 1))

    def __getstate__(self) -> Mapping[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_sizes"}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)
        self._sizes = lru_cache(maxsize=64)(self._group_sizes)
