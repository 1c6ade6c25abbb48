"""How far two renders of one conversation agree."""

from __future__ import annotations

import re


def common_prefix(a: str, b: str) -> int:
    """Length of the longest common prefix of two strings."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def agreement(a: str, b: str) -> tuple[int, int]:
    """How far two strings say the same, white space aside: the length of that part of each."""
    i = j = in_a = in_b = 0
    while i < len(a) and j < len(b):
        if a[i] == b[j]:
            i, j = i + 1, j + 1
            in_a, in_b = i, j
        elif a[i].isspace():
            i += 1
        elif b[j].isspace():
            j += 1
        else:
            break
    return in_a, in_b


def whole(markers: re.Pattern[str], text: str, cut: int) -> int:
    """`cut`, moved back to the start of the control token that it would split."""
    begin = max(0, cut - 100)
    for found in markers.finditer(text, begin, min(len(text), cut + 100)):
        if found.start() < cut < found.end():
            return found.start()
    return cut
