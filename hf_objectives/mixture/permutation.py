"""A random permutation of n numbers, any part of it at any time, in memory that does not grow with n."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import isqrt

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 8
_SHORT = 1 << 14  # shorter permutations are written down: two short digits would not reach all orders alike


def permuted(positions: NDArray[np.int64], size: int, key: Sequence[int]) -> NDArray[np.int64]:
    """The elements, int64 [n], of a random permutation of 0 ... size - 1 at some positions, int64 [n].

    A generalised Feistel network over digit pairs, walked on where it leaves the range (Black and Rogaway, "Ciphers with
    arbitrary finite domains", CT-RSA 2002, sections 3 and 4), with SplitMix64 as its round function. The integers of
    `key`, 0 or more, choose the permutation.

    Example:
        >>> sorted(permuted(np.arange(5), 5, [7]).tolist())
        [0, 1, 2, 3, 4]
    """
    if size <= _SHORT:
        return _written_down(size, tuple(key))[positions]
    right = np.uint64(isqrt(size - 1) + 1)
    left = np.uint64(-(-size // int(right)))
    keys = _round_keys(tuple(key))
    values = _feistel(positions.astype(np.uint64), left, right, keys)
    outside = np.flatnonzero(values >= size)
    while len(outside):
        values[outside] = _feistel(values[outside], left, right, keys)
        outside = outside[values[outside] >= size]
    return values.astype(np.int64)


@lru_cache(maxsize=1024)
def _written_down(size: int, key: tuple[int, ...]) -> NDArray[np.int64]:
    return np.random.default_rng(key).permutation(size)


@lru_cache(maxsize=4096)
def _round_keys(key: tuple[int, ...]) -> NDArray[np.uint64]:
    keys: NDArray[np.uint64] = np.random.SeedSequence(key).generate_state(_ROUNDS, np.uint64)  # type: ignore[assignment]
    return keys


def _feistel(
    values: NDArray[np.uint64], left: np.uint64, right: np.uint64, keys: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    """Permute 0 ... left * right - 1: each digit moves by an amount that the other digit decides."""
    a, b = np.divmod(values, right)
    for first, second in keys.reshape(-1, 2):
        a = (a + _mixed(b + first) % left) % left
        b = (b + _mixed(a + second) % right) % right
    return (a * right + b).astype(np.uint64, copy=False)


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's output function (Steele, Lea and Flood, OOPSLA 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
