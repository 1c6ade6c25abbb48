"""Packing of a stream: a bounded look-ahead, and a state that resumes in the middle of it."""

from __future__ import annotations

import bisect
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import IterableDataset

from hf_objectives.errors import ConfigError
from hf_objectives.packing import IGNORE, check_packing

Document = Mapping[str, Any]
# (length, arrival): the buffer is sorted by it, so that what fits best is found by bisection and ties go to the oldest.
_Place = tuple[int, int]


class StreamPacker(IterableDataset):
    """Packs a stream of encoded documents into rows, from a buffer of some that wait.

    The document that waits longest always goes in the next row, so that none waits for ever; then the largest that still
    fits, again and again. Iterating again after the stream has ended is a new pass. A Trainer takes it as its
    `train_dataset`; with loader workers the documents have to be split between them by their source, as streams of
    `datasets` are.

    Args:
        documents: mappings with `input_ids` and, where not every token is trained, `labels` (lists or integer arrays);
            `source` and `row` are kept. Any iterable; one with `state_dict` and `load_state_dict` resumes without replay.
        max_length: most tokens a row may hold.
        buffer_size: documents that wait at most; 1,000 fill rows to 99 % and more at usual lengths.
        overflow: what becomes of documents longer than a row: "split" into pieces, "truncate" or "drop".

    Attributes:
        counts: since the pass began `documents`, `tokens_in`, `rows`, `tokens_out`, and `dropped: <reason>` in tokens.
            tokens_in = tokens_out + what was dropped + what waits in the buffer.

    Yields (on iteration): `input_ids`, `labels` (int32 [tokens], the first label of each piece -100), `seq_lengths` (int32
    [pieces]), and `sources` and `rows` (lists) where documents carry them. Every row trains a token.

    Raises:
        ConfigError: `max_length` under 2, `buffer_size` under 1, or an unknown `overflow`.

    Example:
        >>> packer = StreamPacker([{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5]}, {"input_ids": [6]}], 4)
        >>> [row["input_ids"].tolist() for row in packer]
        [[1, 2, 3, 6], [4, 5]]
    """

    def __init__(
        self, documents: Iterable[Document], max_length: int, *, buffer_size: int = 1000, overflow: str = "split"
    ) -> None:
        check_packing(max_length, "best_fit", overflow)
        if buffer_size < 1:
            raise ConfigError(f"buffer_size is {buffer_size}; expected at least 1 document")
        self.documents, self.max_length, self.buffer_size, self.overflow = documents, max_length, buffer_size, overflow
        self._resumed: dict[str, Any] | None = None
        self._start({})

    def _start(self, state: Mapping[str, Any]) -> None:
        self.counts: Counter[str] = Counter(state.get("counts", {}))
        self._drawn: int = state.get("drawn", 0)
        self._waiting: dict[int, dict[str, Any]] = {int(at): piece for at, piece in state.get("waiting", [])}
        self._arrivals: int = state.get("arrivals", 0)
        self._exhausted: bool = state.get("exhausted", False)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        state, self._resumed = self._resumed, None
        self._start(state or {})
        source = self._source(state)
        places = sorted((len(piece["input_ids"]), at) for at, piece in self._waiting.items())
        while True:
            while not self._exhausted and len(places) < self.buffer_size:
                document = next(source, None)
                if document is None:
                    self._exhausted = True
                else:
                    self._take(document, places)
            if not places:
                return
            row = self._row(places)
            if row is not None:
                yield row

    def _source(self, state: Mapping[str, Any] | None) -> Iterator[Document]:
        if state is None:
            return iter(self.documents)
        if state["exhausted"]:  # its source may stand at the begin of another pass already
            return iter(())
        if state["source"] is not None:
            self.documents.load_state_dict(state["source"])  # type: ignore[attr-defined]
            return iter(self.documents)
        return itertools.islice(self.documents, state["drawn"], None)

    def _take(self, document: Document, places: list[_Place]) -> None:
        """Put a document in the buffer, in pieces that fit a row."""
        ids = np.asarray(document["input_ids"], np.int32)
        labels = ids if document.get("labels") is None else np.asarray(document["labels"], np.int32)
        self._drawn += 1
        self.counts["documents"] += 1
        self.counts["tokens_in"] += len(ids)
        kept = len(ids)
        if kept > self.max_length and self.overflow != "split":
            kept = self.max_length if self.overflow == "truncate" else 0
            self.counts["dropped: longer than max_length"] += len(ids) - kept
        for begin in range(0, kept, self.max_length):
            end = min(kept, begin + self.max_length)
            piece = {"input_ids": ids[begin:end], "labels": labels[begin:end]}
            piece |= {name: document[name] for name in ("source", "row") if document.get(name) is not None}
            self._waiting[self._arrivals] = piece
            bisect.insort(places, (end - begin, self._arrivals))
            self._arrivals += 1

    def _row(self, places: list[_Place]) -> dict[str, Any] | None:
        """The next row, out of the buffer; None for one that trains nothing."""
        oldest = next(iter(self._waiting))
        at = bisect.bisect_left(places, (len(self._waiting[oldest]["input_ids"]), oldest))
        chosen, room = [], self.max_length
        while True:
            length, arrival = places.pop(at)
            chosen.append(arrival)
            room -= length
            # The largest that fits, and of these the oldest.
            last = bisect.bisect_left(places, (room + 1, -1)) - 1
            if last < 0:
                break
            at = bisect.bisect_left(places, (places[last][0], -1))
        pieces = [self._waiting.pop(arrival) for arrival in sorted(chosen)]
        row = _joined(pieces)
        if not (row["labels"] != IGNORE).any():
            self.counts["dropped: nothing supervised"] += len(row["labels"])
            return None
        self.counts["rows"] += 1
        self.counts["tokens_out"] += len(row["input_ids"])
        return row

    @property
    def fill(self) -> float:
        """Share of the rows' room that tokens fill, of the rows made in this pass."""
        return self.counts["tokens_out"] / max(1, self.counts["rows"] * self.max_length)

    def state_dict(self) -> dict[str, Any]:
        """All that the next row depends on: the documents that wait, the counts, and where the source stands.

        Cheap enough for every row: it refers to arrays that nobody writes to.
        """
        if self._resumed is not None:  # loaded, and not iterated since
            return dict(self._resumed)
        source = getattr(self.documents, "state_dict", None)
        return {
            "counts": dict(self.counts),
            "drawn": self._drawn,
            "arrivals": self._arrivals,
            "exhausted": self._exhausted,
            "waiting": list(self._waiting.items()),
            "source": None if source is None else source(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on, at the next iteration, with exactly the row that would have come; a source without a state of its own is
        read again up to where it stood."""
        self._resumed = dict(state)
        self._start(state)


def _joined(pieces: list[dict[str, Any]]) -> dict[str, Any]:
    lengths = np.array([len(piece["input_ids"]) for piece in pieces], np.int32)
    labels: NDArray[np.int32] = np.concatenate([piece["labels"] for piece in pieces])
    labels[np.cumsum(lengths) - lengths] = IGNORE
    row: dict[str, Any] = {
        "input_ids": np.concatenate([piece["input_ids"] for piece in pieces]),
        "labels": labels,
        "seq_lengths": lengths,
    }
    for name in ("source", "row"):
        if any(name in piece for piece in pieces):
            row[f"{name}s"] = [piece.get(name) for piece in pieces]
    return row
