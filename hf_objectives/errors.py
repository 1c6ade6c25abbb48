"""The errors that hf_objectives raises, and the one way in which they name a place in the data."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the known word closest to `word`, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def place(source: str | None = None, row: int | None = None, turn: int | None = None) -> str:
    """The place of a piece of data in words: `source 'alpaca', row 17, turn 2`. Rows and turns count from 0."""
    parts = []
    if source is not None:
        parts.append(f"source {source!r}")
    if row is not None:
        parts.append(f"row {row}")
    if turn is not None:
        parts.append(f"turn {turn}")
    return ", ".join(parts)


class HFObjectivesError(Exception):
    """Base of every error that this package raises on purpose.

    Attributes:
        exit_code: that of a program which the error ends.
    """

    exit_code = 2


class ConfigError(HFObjectivesError, ValueError):
    """A setting that cannot work: an unknown name, a value out of range, two settings that contradict each other."""


class CheckpointError(ConfigError):
    """A checkpoint that a run cannot go on from: unfinished, damaged, or without optimizer, scheduler or random states."""


class DataError(HFObjectivesError, ValueError):
    """A piece of data that cannot be used.

    Attributes:
        reason: what was found and what was expected, without the place.
        source: name of the data source, None where it is not known (yet).
        row: index of the row in its source, from 0.
        turn: index of the message in its conversation, from 0.
    """

    def __init__(
        self, reason: str, *, source: str | None = None, row: int | None = None, turn: int | None = None
    ) -> None:
        self.reason, self.source, self.row, self.turn = reason, source, row, turn
        super().__init__(reason)

    def __str__(self) -> str:
        where = place(self.source, self.row, self.turn)
        return f"{where}: {self.reason}" if where else self.reason

    def __reduce__(self):
        # Exceptions pickle by positional args; ours carries its place in keywords and must survive DataLoader workers.
        return _rebuild, (type(self), self.reason, self.source, self.row, self.turn)

    def at(self, *, source: str | None = None, row: int | None = None) -> DataError:
        """The same error with the place filled in by a caller that knows it; what is already known stays."""
        self.source = self.source if self.source is not None else source
        self.row = self.row if self.row is not None else row
        return self


def _rebuild(cls, reason, source, row, turn):
    return cls(reason, source=source, row=row, turn=turn)


class FormatError(DataError):
    """A row whose format is not recognised, or that mixes two formats."""


class FileFormatError(DataError):
    """A file that cannot be read as what its name says; `row` is the line number from 1 for line formats."""


class ConversationError(DataError):
    """A conversation that is malformed: no messages, an unknown role, empty or non-string content."""


class VisionContentError(ConversationError):
    """Image, video or audio content, which these text objectives do not support."""


class TemplateError(DataError):
    """A chat template that is missing, fails to render, or drops or rewrites a turn so that labels cannot be exact."""


class NothingSupervisedError(DataError):
    """Rows in which no token would be trained."""


class TokenizerError(HFObjectivesError, ValueError):
    """A tokenizer that lacks what the objective needs (an EOS token, say)."""


class WorkerError(HFObjectivesError, RuntimeError):
    """A worker process that died while it prepared data, most often killed for want of memory."""


class DiskFullError(HFObjectivesError, OSError):
    """No space is left to write a shard or a checkpoint; what was finished stays, and a second run goes on from there."""


class PreparedDataError(HFObjectivesError, ValueError):
    """A prepared folder that is not what the run asks for: made under other settings, unfinished, or damaged."""


class PushError(HFObjectivesError, RuntimeError):
    """A model that is not on the Hub: a name, a login, a connection, or an answer of the server. The run is whole on disk."""

    exit_code = 3  # of a program: it trained, and did not publish


class PackingLeakError(HFObjectivesError, RuntimeError):
    """The model lets one packed document see another on the attention backend in use."""


class NonFiniteError(HFObjectivesError, RuntimeError):
    """A loss or gradient norm that is NaN or infinite; raised on every rank before the weights change."""


class StopTokenError(HFObjectivesError, RuntimeError):
    """A stop token that was trained would not stop generation with the saved generation config."""
