"""What to prepare and how: the settings of a corpus, its sources, and the policy that decides what a token becomes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from hf_objectives.errors import ConfigError, nearest
from hf_objectives.labels import ON_ERROR, EncodingConfig
from hf_objectives.packing import check_packing
from hf_objectives.preparation.readers import DOCUMENTS

#: Goes up when the same input would give other rows; folders of another version are refused.
VERSION = 2
LABELS = ("auto", "always")
_MIXTURE = ("weight", "max_epochs")  # a mixture's settings of a source: they change no token, and no shard


@dataclass(frozen=True, slots=True)
class Source:
    """Where documents come from.

    Attributes:
        name: its name, in rows, counts and metrics.
        path: a file, a folder, a glob, several of these, or a dataset's id on the Hub.
        split: split of a Hub dataset.
        documents: how text files fall into documents: "blank_line", "line" or "file".
    """

    name: str
    path: str | tuple[str, ...]
    split: str = "train"
    documents: str = "blank_line"

    @classmethod
    def read(cls, name: str, given: Any) -> Source:
        """A source from a configuration: a path, or a mapping with `path`.

        Raises:
            ConfigError: no path, an unknown key or value.
        """
        if isinstance(given, (str, list)):
            given = {"path": given}
        if not isinstance(given, Mapping):
            raise ConfigError(f"source {name!r} is {type(given).__name__}; expected a path or a mapping with path")
        known = [f.name for f in fields(cls) if f.name != "name"]
        for key in given:
            if key not in known and key not in _MIXTURE:
                raise ConfigError(f"source {name!r}: unknown key {key!r}{nearest(str(key), known)}")
        path = given.get("path")
        if not path or not isinstance(path, (str, list)):
            raise ConfigError(f"source {name!r}: path is {path!r}; expected a file, a glob or a Hub id")
        documents = given.get("documents", "blank_line")
        if documents not in DOCUMENTS:
            raise ConfigError(
                f"source {name!r}: documents is {documents!r}; expected one of {', '.join(DOCUMENTS)}"
                f"{nearest(str(documents), DOCUMENTS)}"
            )
        where = path if isinstance(path, str) else tuple(path)
        return cls(name, where, str(given.get("split", "train")), documents)


@dataclass
class CorpusSettings:
    """How documents become rows. Every field but the last four decides what the rows hold."""

    max_length: int = field(default=2048, metadata={"help": "Tokens of a row."})
    strategy: str = field(default="best_fit", metadata={"help": "best_fit, first_fit or concat."})
    overflow: str = field(default="split", metadata={"help": "Texts longer than a row: split, truncate or drop."})
    overlength: str = field(default="drop", metadata={"help": "Longer conversations: drop, split_turns or cut."})
    train_on: str = field(default="assistant", metadata={"help": "assistant, last_assistant or all."})
    control_tokens: str = field(default="plain", metadata={"help": "plain or allow."})
    expand_turns: bool = field(default=False, metadata={"help": "One row per user turn."})
    chat_template: str | None = field(default=None, metadata={"help": "A template, or the path of a .jinja file."})
    eval_share: float = field(default=0.0, metadata={"help": "Share of the documents that is held out."})
    eval_seed: int = field(default=0, metadata={"help": "Decides which documents are held out."})
    labels: str = field(
        default="auto",
        metadata={"help": "always writes labels; auto leaves them out where all tokens of texts are trained."},
    )
    shard_bytes: int = field(default=64 << 20, metadata={"help": "Input of a shard, in bytes."})
    file_format: str = field(default="parquet", metadata={"help": "parquet or arrow."})
    on_error: str = field(default="raise", metadata={"help": "Broken records: raise or skip."})
    num_proc: int | None = field(default=None, metadata={"help": "Worker processes, one per core by default."})
    engine: str = field(default="local", metadata={"help": "local or ray."})

    def __post_init__(self) -> None:
        check_packing(self.max_length, self.strategy, self.overflow)
        for name, known in (("labels", LABELS), ("on_error", ON_ERROR)):
            value = getattr(self, name)
            if value not in known:
                raise ConfigError(
                    f"{name} is {value!r}; expected one of {', '.join(known)}{nearest(str(value), known)}"
                )
        if not 0 <= self.eval_share < 1:
            raise ConfigError(f"eval_share is {self.eval_share}; expected 0 or more, under 1")
        if self.shard_bytes < 1:
            raise ConfigError(f"shard_bytes is {self.shard_bytes}; expected at least 1")

    def row_settings(self) -> EncodingConfig:
        """The part that rows are encoded under."""
        return EncodingConfig(
            max_length=self.max_length,
            train_on=self.train_on,
            control_tokens=self.control_tokens,
            overlength=self.overlength,
            expand_turns=self.expand_turns,
            chat_template=self.chat_template,
            splits_documents=True,
        )

    def policy(self, tokenizer: Any) -> dict[str, Any]:
        """All that decides what rows a document becomes: equal policies, equal rows."""
        ours = {f.name: getattr(self, f.name) for f in fields(CorpusSettings) if f.name not in _NOT_POLICY}
        return {
            "preparation_version": VERSION,
            "tokenizer": tokenizer_digest(tokenizer),
            "chat_template": _digest(self.chat_template or tokenizer.chat_template or ""),
            **{name: value for name, value in ours.items() if name != "chat_template"},
        }


# What may differ between two runs over the same shards.
_NOT_POLICY = ("on_error", "num_proc", "engine")


def tokenizer_digest(tokenizer: Any) -> str:
    """A digest of all of a tokenizer that shapes ids: its backend, byte for byte, and its special tokens."""
    special = {name: str(token) for name, token in sorted(tokenizer.special_tokens_map.items())}
    framed = tokenizer("a")["input_ids"]
    return _digest(tokenizer.backend_tokenizer.to_str() + json.dumps([special, framed], sort_keys=True))


def _digest(text: Any) -> str:
    return hashlib.sha256((text if isinstance(text, str) else json.dumps(text, sort_keys=True)).encode()).hexdigest()[
        :32
    ]


def difference(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """What two policies disagree on, a line each."""
    names = dict.fromkeys([*expected, *found])
    return [
        f"{name}: {found.get(name, 'missing')!r} there, {expected.get(name, 'missing')!r} asked for"
        for name in names
        if found.get(name) != expected.get(name)
    ]
