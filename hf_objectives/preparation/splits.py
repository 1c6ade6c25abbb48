"""Held-out rows: which rows are evaluated on instead of trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson
from numpy.typing import NDArray

from hf_objectives.errors import ConfigError, FormatError
from hf_objectives.types import TOO_DEEP, Row

if TYPE_CHECKING:
    from datasets import Dataset  # takes seconds to import, and options of the command line are checked here

SPLITS = ("train", "validation")
ROWS_READ = 2_000  # of a dataset at a time
_JSON = orjson.OPT_SORT_KEYS | orjson.OPT_NON_STR_KEYS | orjson.OPT_SERIALIZE_NUMPY


def check_share(name: str, share: float) -> None:
    """Raise a ConfigError where a share of rows that is held out is under 0, or 1 or more."""
    if not 0 <= share < 1:
        raise ConfigError(f"{name} is {share}; expected 0 or more, under 1")


def draw_rows(rows: Iterable[Row], seed: int) -> NDArray[np.float64]:
    """Draw a number from 0 to 1 for each row, float64 [rows]; a row is held out if its number is under the share.

    The number depends on the seed and on the content of the row alone. So fine-tuning and preparation hold out the same
    rows, whatever files the rows lie in, and two equal rows are never on both sides.
    """
    digests = [hashlib.blake2b(_content(row), digest_size=8, key=str(seed).encode()).digest() for row in rows]
    return np.frombuffer(b"".join(digests), "<u8") / 2.0**64


def _content(row: Row) -> bytes:
    try:
        return orjson.dumps(row, default=repr, option=_JSON)
    except TypeError:  # half of a surrogate pair, say
        try:
            return repr(row).encode("utf-8", "surrogatepass")
        except RecursionError:
            raise FormatError(TOO_DEEP) from None


def hold_out(rows: Dataset | Sequence[Row], share: float, *, seed: int = 0) -> tuple[list[int], list[int]]:
    """Split rows into those to train on and those to evaluate on; see `draw_rows` for the rule.

    Args:
        rows: the rows.
        share: the expected share of held-out rows. Unless it is 0, at least one row is on each side.
        seed: another seed holds out other rows.

    Returns:
        The row numbers of both sides, each in ascending order.

    Raises:
        ConfigError: `share` is under 0, or 1 or more, or there are not two rows to split.
    """
    held = are_held_out(rows, share, seed=seed)
    return np.flatnonzero(~held).tolist(), np.flatnonzero(held).tolist()


def are_held_out(rows: Dataset | Sequence[Row], share: float, *, seed: int = 0) -> NDArray[np.bool_]:
    """Which rows `hold_out` evaluates on, bool [rows]."""
    check_share("eval_share", share)
    if not share:
        return np.zeros(len(rows), bool)
    if len(rows) < 2:
        raise ConfigError(f"eval_share {share} of {len(rows)} rows leaves nothing to train on")
    begins = range(0, len(rows), ROWS_READ)
    drawn = np.concatenate([draw_rows(rows_between(rows, begin, begin + ROWS_READ), seed) for begin in begins])
    held = drawn < share
    # The first of the smallest and the last of the largest, as a stable sort would have them.
    held[drawn.argmin()], held[len(drawn) - 1 - drawn[::-1].argmax()] = True, False
    return held


def rows_between(rows: Dataset | Sequence[Row], begin: int, end: int) -> list[Any]:
    """Rows from one number to another as Python values, whatever the format of a dataset."""
    return list(rows[begin:end]) if isinstance(rows, Sequence) else _values(rows, slice(begin, end))


def rows_at(rows: Dataset | Sequence[Row], numbers: NDArray[np.int64]) -> list[Any]:
    """Rows by number, int64 [rows], as Python values."""
    if not isinstance(rows, Sequence):
        return _values(rows, numbers) if len(numbers) else []
    take = getattr(rows, "take", None)  # of rows that are read many at a time
    return take(numbers) if take is not None else [rows[i] for i in numbers.tolist()]


def _values(rows: Dataset, index: Any) -> list[Any]:
    found = rows.with_format("arrow")[index].to_pylist()
    # JSON that fits no table is text there. Images stay as they are: decoded, they would differ from read to read.
    for name in (name for name, feature in rows.features.items() if "Json(" in repr(feature)):
        for row, value in zip(found, rows.with_format(None, columns=[name])[index][name], strict=True):
            row[name] = value
    return found
