"""Blocks of a mixture's order: draws that were ordered together, what they give, and a journal of the last ones."""

from __future__ import annotations

import os
import pickle
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_objectives.mixture.feeds import Units
from hf_objectives.mixture.row_table import Integers
from hf_objectives.packing import PackedRows

#: The state of an order, as JSON values; see `Order.state`.
State = Mapping[str, Any]
_KEPT = 256  # blocks in a journal: more than loaders read ahead


# What each source has given up to some row, float64 [sources] each.
Totals = dict[str, NDArray[np.float64]]


def totals_of(state: State | None, sources: int) -> Totals:
    """What each source has given up to the place of a state: `amounts` in the mixture's unit, `tokens`, `examples`, and
    `passes`, the epochs of the source that are over."""
    given = state["given"] if state else dict.fromkeys(("amounts", "tokens", "examples", "passes"), [0.0] * sources)
    return {name: np.array(values, np.float64) for name, values in given.items()}


@dataclass(frozen=True)
class Block:
    """Draws that were ordered together, and the rows that they make.

    Attributes:
        sources: the source of each draw, int64 [draws].
        drawn: the draws, in order.
        packed: how they lie in rows; None where each is one.
        before: the state of the order before it, see `Order.state`.
    """

    sources: Integers
    drawn: Units
    packed: PackedRows | None
    before: State

    @property
    def row(self) -> int:
        """The number of rows before it."""
        return self.before["row"]

    @property
    def num_rows(self) -> int:
        """Number of rows that it makes."""
        return len(self.drawn) if self.packed is None else len(self.packed.row_offsets) - 1

    @property
    def end(self) -> int:
        """The row behind its last one."""
        return self.row + self.num_rows

    def totals(self, row: int) -> Totals:
        """What each source has given from the beginning of the order up to a row of this block, or its end."""
        sources = len(self.before["cursors"])
        before = totals_of(self.before, sources)
        epochs = before["passes"].copy()
        if self.packed is None:
            begun = pieces = np.arange(min(row, self.end) - self.row)
            tokens = self.drawn.tokens[pieces]
            np.maximum.at(epochs, self.sources[begun], self.drawn.epochs_done[begun])
        else:
            seen = np.repeat(np.arange(self.num_rows), np.diff(self.packed.piece_offsets)) < row - self.row
            # A document counts where its first piece lies; its tokens where they are.
            pieces, tokens = self.packed.documents[seen], self.packed.lengths[seen]
            begun = np.unique(pieces)
            # Rows are in no order: of what all draws of the block move a source on, take the share that is given.
            after = epochs.copy()
            np.maximum.at(after, self.sources, self.drawn.epochs_done)
            drawn = np.maximum(np.bincount(self.sources, minlength=sources), 1)
            epochs += (after - epochs) * np.bincount(self.sources[begun], minlength=sources) / drawn
        return {
            "amounts": before["amounts"] + np.bincount(self.sources[begun], self.drawn.amounts[begun], sources),
            "tokens": before["tokens"] + np.bincount(self.sources[pieces], tokens, sources),
            "examples": before["examples"] + np.bincount(self.sources[begun], self.drawn.examples[begun], sources),
            "passes": epochs,
        }


class Journal:
    """The last blocks that were read, in a folder: loader workers read streams, and the process that trains finds their
    blocks here. The folder is deleted with the process that made it."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="mixture-"))
        weakref.finalize(self, _remove, self._folder, os.getpid())

    def write(self, block: Block) -> None:
        """Keep a block, and only the last few before it. Every worker writes, and all write the same."""
        path = self._folder / f"{block.row:020d}-{block.num_rows}"
        if path.exists():
            return
        draft = self._folder / f"draft-{os.getpid()}"
        draft.write_bytes(pickle.dumps(block))
        draft.replace(path)
        for old in [other for other in self._blocks() if other.name < path.name][:-_KEPT]:
            old.unlink(missing_ok=True)

    def find(self, row: int) -> Block | None:
        """The block with a row, or else the one that ends before it; None where neither was read."""
        ending = None
        for path in self._blocks():
            begin, count = map(int, path.name.split("-"))
            if begin <= row < begin + count:
                return pickle.loads(path.read_bytes())
            if begin + count == row:
                ending = path
        return None if ending is None else pickle.loads(ending.read_bytes())

    def _blocks(self) -> list[Path]:
        return sorted(path for path in self._folder.iterdir() if not path.name.startswith("draft"))


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # forked workers inherit the finalizer
        shutil.rmtree(folder, ignore_errors=True)
