"""Read log lines from JSON: one object a line, or the `log_history` of a `trainer_state.json`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import orjson

CHUNK = 1 << 22  # bytes of a state that are parsed at once
HISTORY = re.compile(rb'"log_history"\s*:\s*\[')
_ARRAY = re.compile(rb"(?:\xef\xbb\xbf)?\s*\[")
_BETWEEN = re.compile(r"(?<=\})\s*,\s*(?=\{)")
_BEGIN = re.compile(rb'\s*(\{\s*"[^"]*")')
_CLOSED = re.compile(r"[}\s]\]\s*(?:[,}]|$)")
_DECODER = json.JSONDecoder()
_DAMAGE = object()


def parse_object(text: Any) -> dict[str, Any] | None:
    """Parse one JSON object, which may hold NaN and Infinity; None where `text` is no such object."""
    try:
        entry = orjson.loads(text)
    except orjson.JSONDecodeError:
        try:
            entry = json.loads(text)  # accepts NaN and Infinity
        except (ValueError, TypeError, RecursionError):
            return None
    return entry if isinstance(entry, dict) else None


def read_json_lines(path: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file of JSON lines; `notes` gets a sentence about lines that are no objects."""
    bad: list[tuple[int, bool]] = []  # number of the line, and whether it has a line end
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            if (entry := parse_object(line)) is not None:
                yield entry
            else:
                bad.append((number, line.endswith(b"\n")))
    if bad and not bad[-1][1]:
        notes.append(f"line {bad.pop()[0]:,}, the last, is cut short: the log is damaged there or still being written")
    if bad:
        notes.append(f"{len(bad):,} lines are no JSON objects and were left out, the first is line {bad[0][0]:,}")


def read_history(path: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    """Yield the entries of a state's `log_history`, or of an array of log lines, also those behind damage.

    A million entries at once would take a gigabyte, so the text is parsed in pieces that end between two entries.
    """
    text = path.read_bytes()
    opened = _ARRAY.match(text) or HISTORY.search(text)
    if opened is None:
        notes.append("it has no log_history")
        return
    # A piece ends before an entry that begins as the first one does: an object inside of an entry begins otherwise.
    begin = _BEGIN.match(text, opened.end())
    between = re.compile(rb"(?<=\})\s*,\s*(?=" + (re.escape(begin[1]) if begin else rb"\{") + rb")")
    damage: list[str] = []  # where
    odd: list[Any] = []  # entries that are no objects
    step, start, rest, entry = None, opened.end(), "", None
    while start < len(text) and not rest.startswith("]"):
        cut = between.search(text, start + CHUNK)
        entries, rest = _parse_entries(text[start : cut.start() if cut else None])
        start = cut.end() if cut else len(text)
        for entry in entries:
            if isinstance(entry, dict):
                step = entry.get("step", step)
                yield entry
            elif entry is _DAMAGE:
                damage.append("at its start" if step is None else f"after step {step}")
            else:
                odd.append(entry)
    ended = rest.startswith("]") or bool(_CLOSED.search(rest) and rest.rstrip().endswith(("}", "]")))
    if not ended and entry is _DAMAGE:
        damage.pop()
    if damage:
        places = f"{len(damage):,} place" + ("s, the first" if len(damage) > 1 else ",")
        notes.append(f"it is damaged in {places} {damage[0]}: what stood there was left out")
    if not ended:
        notes.append(
            "it ends in the middle of its log: damaged there or still being written; the lines before were read"
        )
    if odd:
        notes.append(f"{len(odd):,} entries of the log are no objects, the first is {str(odd[0])[:60]}")


def _parse_entries(piece: bytes) -> tuple[list[Any], str]:
    """The entries in a piece of the text, `_DAMAGE` for each that cannot be read, and the text behind the last one.

    Where the last one is damaged, the rest begins with it. At the end of the log the rest begins with its bracket.
    """
    try:
        return orjson.loads(b"[" + piece + b"]"), ""
    except orjson.JSONDecodeError:  # a NaN, damage, or the end of the log
        text = piece.decode("utf-8", errors="replace")
    try:
        entries, end = _DECODER.raw_decode(f"[{text}]")
        return entries, text[end - 2 :]
    except (ValueError, RecursionError):
        entries, rest = [], ""
    for part in _BETWEEN.split(text):
        rest = part.lstrip()
        with suppress(ValueError, RecursionError):  # what cannot be read stays in `rest`, and counts as damage below
            entry, end = _DECODER.raw_decode(rest)
            entries.append(entry)
            rest = rest[end:].lstrip(" \t\r\n,")
        if rest.startswith("]"):
            break
        if rest:
            entries.append(_DAMAGE)
    return entries, rest
