"""Rows from local files (json, jsonl, parquet, txt) or the Hub, as they were written: no column of one row in another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from datasets import Dataset, load_dataset

from hf_objectives.errors import ConfigError, FileFormatError

Rows = list[dict[str, Any]]


def load_rows(name: str, *, split: str = "train") -> Rows | Dataset:
    """Rows of a local file, or of a dataset of the Hub.

    JSON is read by Python, not into an Arrow table, so that tools with different parameters keep their own keys. A text
    file holds documents separated by blank lines.

    Args:
        name: a path ending in .json, .jsonl, .parquet or .txt, or a dataset's id on the Hub.
        split: split of a Hub dataset.

    Raises:
        FileFormatError: a file that is missing, empty or not what its name says; names the line.
        ConfigError: a path whose ending is not known.
    """
    path = Path(name)
    if path.suffix in _READERS:
        if not path.exists():
            raise FileFormatError(f"no such file: {name}")
        rows = _READERS[path.suffix](path)
        if not rows:
            raise FileFormatError(f"{name} holds no rows")
        return rows
    if path.exists():
        raise ConfigError(f"{name} ends in {path.suffix or 'nothing'}; expected one of {', '.join(_READERS)}")
    return load_dataset(name, split=split)


def hold_out(rows: Rows | Dataset, share: float, *, seed: int = 0) -> tuple[list[int], list[int]]:
    """Row numbers to train on and to evaluate on; a row's side follows from seed and number alone.

    Args:
        rows: the rows.
        share: share to evaluate on, from 0 to 1; at least one row is held out unless it is 0.

    Raises:
        ConfigError: `share` is not from 0 up to, not including, 1, or leaves nothing to train on.
    """
    if not 0 <= share < 1:
        raise ConfigError(f"eval_share is {share}; expected 0 or more, under 1")
    order = sorted(range(len(rows)), key=lambda i: hashlib.blake2b(f"{seed} {i}".encode(), digest_size=8).digest())
    size = max(1, round(share * len(rows))) if share else 0
    if size >= len(rows):
        raise ConfigError(f"eval_share {share} of {len(rows)} rows leaves nothing to train on")
    return sorted(order[size:]), sorted(order[:size])


def _json(path: Path) -> Rows:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # JSON lines under the name of JSON
            return _json_lines(path)
        raise FileFormatError(f"{path}, line {error.lineno}: not valid JSON ({error.msg})") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise FileFormatError(f"{path} holds {type(rows).__name__}; expected a list of objects")
    return rows


def _json_lines(path: Path) -> Rows:
    rows = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise FileFormatError(f"{path}, line {number}: not valid JSON ({error.msg}): {line[:60]!r}") from error
            if not isinstance(row, dict):
                raise FileFormatError(f"{path}, line {number}: {type(row).__name__}; expected an object")
            rows.append(row)
    return rows


def _parquet(path: Path) -> Rows:
    try:
        return pq.read_table(path).to_pylist()
    except (OSError, ValueError) as error:
        raise FileFormatError(f"{path} is not a Parquet file ({error})") from error


def _text(path: Path) -> Rows:
    documents: Sequence[str] = path.read_text(encoding="utf-8").split("\n\n")
    return [{"text": document.strip("\n")} for document in documents if document.strip()]


_READERS = {".json": _json, ".jsonl": _json_lines, ".parquet": _parquet, ".txt": _text}
