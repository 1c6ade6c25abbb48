"""Shards on disk: written beside and moved into place, with a checksum, so a shard is whole or not there."""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_origin, get_type_hints
from zlib import crc32

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from hf_objectives.errors import DiskFullError, PreparedDataError

# The values of a list column end to end, and where each row begins in them.
Column = tuple[Any, NDArray[np.int64]]
PROGRESS = ".progress"  # folder of shards that are being written, and of the accounts of finished segments


@dataclass(frozen=True, slots=True)
class Shard:
    """A finished shard.

    Attributes:
        path: its file, relative to the folder.
        split: "train" or "validation".
        source, file: the source and the file of its documents.
        rows, tokens, supervised: packed rows, their tokens, and their trained tokens.
        row_groups: rows of each row group or record batch.
        num_bytes: size of the file.
        sha256: checksum of the file, as `sha256sum` prints it.
        checksums: by column, the CRC-32 of each row group's values (`checksum_of`); empty in shards of earlier releases.
    """

    path: str
    split: str
    source: str
    file: str
    rows: int
    tokens: int
    supervised: int
    row_groups: list[int]
    num_bytes: int
    sha256: str
    checksums: dict[str, list[int]] = field(default_factory=dict)

    def intact(self, folder: Path, *, checksum: bool = True) -> bool:
        """Whether the file is there as it was written."""
        file = folder / self.path
        if not file.is_file() or file.stat().st_size != self.num_bytes:
            return False
        return not checksum or sha256(file) == self.sha256

    def check(self, folder: Path, *, checksum: bool = True) -> None:
        """Raise a PreparedDataError if the file is not there as it was written."""
        if not self.intact(folder, checksum=False):
            raise PreparedDataError(f"{folder / self.path} is missing or cut off; run hf-objectives prepare again")
        if checksum and not self.intact(folder):
            raise PreparedDataError(f"{folder / self.path} fails its checksum; run hf-objectives prepare again")


def check_types(part: Any) -> None:
    """Raise where a field of a dataclass that was read is not of its type, is negative, or leads out of the folder."""
    for name, hint in get_type_hints(type(part)).items():
        kind, value = get_origin(hint) or hint, getattr(part, name)
        numbers = value if name == "row_groups" else [value] if kind is int else []
        if type(value) is not kind or not all(type(number) is int and 0 <= number < 1 << 63 for number in numbers):
            raise TypeError(f"{name} is {value!r:.60}; expected {kind.__name__}")
    if isinstance(part, Shard) and (Path(part.path).is_absolute() or ".." in Path(part.path).parts):
        raise ValueError(f"path {part.path!r:.60} leads out of the folder")


class ShardWriter:
    """Writes packed rows to one file; leaving the context closes the file, and removes it after an error.

    The shard gets its `path` in the folder when it is finished. Columns named in `types` are stored in these types.
    """

    def __init__(
        self, folder: Path, path: str, file_format: str, types: Mapping[str, type[np.unsignedinteger]]
    ) -> None:
        self.final = folder / path
        self.draft = folder / PROGRESS / path.replace("/", "-")
        self._open, self._types = FORMATS[file_format], types
        self._writer: Any = None
        self.row_groups: list[int] = []
        self.checksums: dict[str, list[int]] = {}

    def write(self, table: pa.Table) -> None:
        """Add packed rows, as one row group or record batch."""
        for name, kind in self._types.items():
            column = table[name].combine_chunks()
            narrow = type(column).from_arrays(column.offsets, column.values.cast(pa.from_numpy_dtype(kind)))
            table = table.set_column(table.column_names.index(name), name, narrow)
        table = table.combine_chunks()
        try:
            if self._writer is None:
                self._writer = self._open(str(self.draft), table.schema)
            self._writer.write_table(table, table.num_rows)
        except OSError as error:
            raise disk_full(error, self.final) from error
        self.row_groups.append(table.num_rows)
        for name, column in columns_of(table).items():
            self.checksums.setdefault(name, []).append(checksum_of(column))

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        try:
            if self._writer is not None:
                self._writer.close()
        except OSError as failed:
            kind = kind or type(failed)
            raise disk_full(failed, self.final) from failed
        finally:
            if kind is not None:
                self.draft.unlink(missing_ok=True)

    def finish(self, **values: Any) -> Shard | None:
        """Move the closed file into place; None where no row was written. `values` are what the file does not tell."""
        if self._writer is None:
            return None
        digest, size = sha256(self.draft), self.draft.stat().st_size
        self.final.parent.mkdir(parents=True, exist_ok=True)
        self.draft.replace(self.final)
        more = {
            "row_groups": self.row_groups,
            "checksums": self.checksums,
            "num_bytes": size,
            "sha256": digest,
            **values,
        }
        return Shard(rows=sum(self.row_groups), **more)


def sha256(path: Path) -> str:
    """The checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def columns_of(table: pa.Table) -> dict[str, Column]:
    """The lists of a row group by column."""
    columns: dict[str, Column] = {}
    for name in table.column_names:
        lists = table[name].combine_chunks()
        values, offsets = lists.flatten(), lists.offsets.to_numpy().astype(np.int64)
        columns[name] = values.to_numpy() if pa.types.is_integer(values.type) else values, offsets - offsets[0]
    return columns


def checksum_of(column: Column) -> int:
    """The CRC-32 of a column's values and of where its rows begin, whatever file they come from."""
    values, begins = column
    data = values.data if isinstance(values, np.ndarray) else "\0".join(values.to_pylist()).encode()
    return crc32(begins.data, crc32(data))


def smallest_type(size: int) -> type[np.unsignedinteger]:
    """The smallest unsigned type that holds the numbers under `size`; 65,536 ids fit in two bytes."""
    return next(kind for kind in (np.uint8, np.uint16, np.uint32) if size - 1 <= np.iinfo(kind).max)


def _parquet(path: str, schema: pa.Schema) -> pq.ParquetWriter:
    # Splitting ids by byte before zstd makes files as small as a dictionary does, in less time. Positions count up.
    encodings = {
        f"{field.name}.list.element": "DELTA_BINARY_PACKED" if field.name == "position_ids" else "BYTE_STREAM_SPLIT"
        for field in schema
        if pa.types.is_list(field.type) and pa.types.is_integer(field.type.value_type)
    }
    return pq.ParquetWriter(
        path,
        schema,
        compression="zstd",
        compression_level=1,
        use_dictionary=["sources.list.element"],
        column_encoding=encodings,
        write_statistics=False,
    )


def _arrow(path: str, schema: pa.Schema) -> pa.RecordBatchStreamWriter:
    return pa.ipc.new_stream(path, schema)  # the form that datasets maps into memory


#: How shards are written, by name.
FORMATS: dict[str, Callable[[str, pa.Schema], Any]] = {"parquet": _parquet, "arrow": _arrow}


def disk_full(error: OSError, path: Path) -> Exception:
    """The error as a DiskFullError, where that is what it says."""
    # pyarrow's errors carry the number in words alone.
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or "No space left" in str(error):
        return DiskFullError(f"no space left to write {path.name} in {path.parent} ({error})")
    return error
