"""The last blocks that were read, where the process that trains finds them: loader workers read the streams."""

from __future__ import annotations

import os
import pickle
import shutil
import tempfile
import weakref
from pathlib import Path

from hf_objectives.mixture.order import Block

_KEPT = 256  # blocks: more than loaders read ahead


class Journal:
    """Blocks by the rows that they hold, in a folder that goes with the process that made it."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="mixture-"))
        weakref.finalize(self, _remove, self._folder, os.getpid())

    def write(self, block: Block) -> None:
        """Keep a block, and no more than the last few before it.

        Every worker writes: who has made a row has then noted its block, whoever is ahead. All write the same.
        """
        path = self._folder / f"{block.row:020d}-{block.num_rows}"
        if path.exists():
            return
        draft = self._folder / f"draft-{os.getpid()}"
        draft.write_bytes(pickle.dumps(block))
        draft.replace(path)
        for old in [other for other in self._blocks() if other.name < path.name][:-_KEPT]:
            old.unlink(missing_ok=True)

    def find(self, row: int) -> Block | None:
        """The block with a row, or that ends with the row before it; None where neither was read."""
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
