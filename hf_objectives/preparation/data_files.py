"""Rows from local files or the Hub, as they were written: no column of one row in another."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset

from hf_objectives.errors import ConfigError
from hf_objectives.preparation.readers import kind_of
from hf_objectives.preparation.readers import load_rows as read_rows

Rows = list[dict[str, Any]]


def load_rows(name: str, *, split: str = "train") -> Rows | Dataset:
    """Rows of local files, or of a dataset of the Hub.

    JSON is read as Python values, not into an Arrow table, so that tools with different parameters keep their own keys. A
    text file holds documents separated by blank lines.

    Args:
        name: a file, folder or glob (.json, .jsonl, .parquet, .txt, plain or with .gz or .zst), or a dataset's id on the
            Hub.
        split: split of a Hub dataset.

    Raises:
        FileFormatError: a file that is missing, empty or not what its name says; names the line.
        ConfigError: a path whose ending is not known.
    """
    return load_dataset(name, split=split) if is_hub_id(name) else read_rows(name)


def is_hub_id(path: str) -> bool:
    """Whether a path can only be the id of a dataset on the Hub: `owner/name`, and no such file."""
    looks = path.count("/") <= 1 and not path.startswith((".", "/", "~")) and not any(c in path for c in "*?[")
    return looks and not Path(path).exists() and kind_of(path) is None


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
