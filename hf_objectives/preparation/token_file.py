"""Encoded documents in a temporary file: appended batch by batch, then memory-mapped."""

from __future__ import annotations

import mmap
import shutil
import tempfile
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hf_objectives.packing import flat_column, list_column
from hf_objectives.preparation.shards import disk_full


class TokenFile:
    """A table of encoded documents that grows on disk, in unlinked temporary files.

    Packing reads documents in any order. So all ids are contiguous, all labels too, and the table has one chunk.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ids = self._new()
        self._labels: IO[bytes] | None = None  # until a document has some of its own
        self._lengths: list[NDArray[np.int64]] = []
        self._others: list[pa.Table] = []

    def write(self, table: pa.Table) -> None:
        """Append documents: `input_ids`, perhaps `labels`, and other columns, which are kept in memory.

        Raises:
            DiskFullError: the folder has no room.
        """
        ids, offsets = flat_column(table, "input_ids")
        own = "labels" in table.column_names
        try:
            if own and self._labels is None:
                self._labels = self._new()
                self._ids.seek(0)
                shutil.copyfileobj(self._ids, self._labels)
            self._ids.write(ids.data)
            if self._labels is not None:
                self._labels.write((flat_column(table, "labels")[0] if own else ids).data)
        except OSError as error:
            raise disk_full(error, self._folder / "input_ids") from error
        self._lengths.append(np.diff(offsets))
        self._others.append(table.drop_columns(["input_ids", *["labels"] * own]))

    def table(self) -> pa.Table:
        """All documents: `input_ids`, `labels` where a document has some, and the other columns."""
        offsets = np.concatenate([np.zeros(1, np.int64), *self._lengths]).cumsum()
        columns = {"input_ids": list_column(_mapped(self._ids), offsets)}
        if self._labels is not None:
            columns["labels"] = list_column(_mapped(self._labels), offsets)
        others = pa.concat_tables(self._others).combine_chunks()
        return pa.table({**columns, **{name: others[name] for name in others.column_names}})

    def _new(self) -> IO[bytes]:
        return tempfile.TemporaryFile(dir=self._folder)


def _mapped(file: IO[bytes]) -> NDArray[np.int32]:
    file.flush()
    if not file.seek(0, 2):
        return np.empty(0, np.int32)
    return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.int32)
