"""The log lines of a `trainer_state.json`, or of an array of them: read piece by piece, and on behind damage."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

CHUNK = 1 << 22  # characters that are read at once
LONGEST = 1 << 20  # characters; where so many do not make an entry, the file is damaged
HISTORY = re.compile(r'"log_history"\s*:\s*\[')
_GAP = re.compile(r"[\s,]*")
_NEXT = re.compile(r"\}\s*,\s*(?=\{)")  # between two entries
_CLOSED = re.compile(r"[}\s]\]\s*(?:[,}]|$)")


class StateLines:
    """Iterates over the lines of a state's `log_history`, or of an array of log lines; once.

    Attributes:
        notes: after the iteration, what could not be read, a sentence each.
    """

    def __init__(self, path: Path) -> None:
        self.notes: list[str] = []
        self._path = path
        self._text, self._at = "", 0
        self._tried = 0  # up to here many entries at once were tried
        self._places, self._first = 0, ""  # of damage
        self._step: Any = None  # of the last entry that was read
        self._odd: list[Any] = []

    def __iter__(self) -> Iterator[dict[str, Any]]:
        with self._path.open(encoding="utf-8-sig", errors="replace") as self._file:
            if not self._begin():
                self.notes.append("it has no log_history")
                return
            while (entries := self._read()) is not None:
                for entry in entries:
                    if isinstance(entry, dict):
                        self._step = entry.get("step", self._step)
                        yield entry
                    else:
                        self._odd.append(str(entry)[:60])
        if self._places:
            places = f"{self._places:,} place" + ("s, the first" if self._places > 1 else ",")
            self.notes.insert(0, f"it is damaged in {places} {self._first}: what stood there was left out")
        if self._odd:
            self.notes.append(f"{len(self._odd):,} entries of the log are no objects, the first is {self._odd[0]}")

    def _begin(self) -> bool:
        self._text = self._file.read(CHUNK)
        seen = 0
        while (found := HISTORY.search(self._text, seen)) is None and not self._text.lstrip().startswith("["):
            seen = max(0, len(self._text) - 64)
            if not (more := self._file.read(CHUNK)):
                return False
            self._text += more
        self._at = found.end() if found else self._text.index("[") + 1
        return True

    def _more(self) -> bool:
        more = self._file.read(CHUNK)
        if more:
            self._text, self._at, self._tried = self._text[self._at :] + more, 0, 0
        return bool(more)

    def _read(self) -> list[Any] | None:
        """The next entries; None at the end."""
        while True:
            self._at = _GAP.match(self._text, self._at).end()  # type: ignore[union-attr]
            if self._text[self._at : self._at + 1] == "]":
                return None
            if entries := self._many():
                return entries
            try:
                entry, self._at = json.JSONDecoder().raw_decode(self._text, self._at)
                return [entry]
            except (ValueError, RecursionError) as error:
                if len(self._text) - self._at < LONGEST and self._more():
                    continue
                if not self._skip(str(error.args[0]).split(":")[0].lower()):
                    return None

    def _many(self) -> list[dict[str, Any]] | None:
        """Many entries at once, an order faster; none where that fails, as at the end, at a NaN and at damage."""
        cut = self._text.rfind("}", self._at) + 1
        if self._at < self._tried or not cut:
            return None
        self._tried = cut
        try:
            entries = orjson.loads(f"[{self._text[self._at : cut]}]")
        except orjson.JSONDecodeError:
            return None
        if not all(isinstance(entry, dict) for entry in entries):
            return None
        self._at = cut
        return entries

    def _skip(self, error: str) -> bool:
        """Go to the entry behind damage; False where there is none."""
        while (found := _NEXT.search(self._text, self._at)) is None:
            tail = self._text[self._at :]
            self._at = max(self._at, len(self._text) - 64)  # a boundary may stand across two pieces
            if self._more():
                continue
            if not (_CLOSED.search(tail) and tail.rstrip().endswith(("}", "]"))):
                self.notes.append(
                    f"it ends in the middle of its log ({error}): damaged there or still being written; the lines before "
                    "were read"
                )
                return False
            self._at = len(self._text)
            break
        else:
            self._at = found.end()
        self._first = self._first or ("at its start" if self._step is None else f"after step {self._step}")
        self._places += 1
        return self._at < len(self._text)
