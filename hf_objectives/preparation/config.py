"""What to prepare and how: the options of a corpus, its sources, and the policy that decides its rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field, fields
from typing import Any, ClassVar

from hf_objectives.errors import ConfigError
from hf_objectives.labels import ON_ERROR, EncodingConfig
from hf_objectives.packing import check_packing
from hf_objectives.preparation.files import DOCUMENTS
from hf_objectives.preparation.shards import FORMATS
from hf_objectives.preparation.splits import check_share
from hf_objectives.types import check_keys, check_one_of

#: Version of prepared rows, raised when the same input gives other rows; folders of another version are refused.
#: 3: rows are held out by their content. 2: by file and number.
VERSION = 4
LABELS = ("auto", "always")
# Fields of CorpusConfig that may differ between two runs over the same shards.
_NOT_POLICY = ("on_error", "num_proc", "engine")


@dataclass(frozen=True, slots=True)
class Source:
    """Where documents come from; `name` stands in rows, counts and metrics.

    Attributes:
        path: a file, a folder, a glob, several of these, or a dataset's id on the Hub.
        split: split of a Hub dataset.
        documents: how text files are cut into documents: "blank_line", "line" or "file".
    """

    name: str
    path: str | tuple[str, ...]
    split: str = "train"
    documents: str = "blank_line"

    @classmethod
    def read(cls, name: str, entry: Any) -> Source:
        """Read a source from a configuration: a path, or a mapping with `path`."""
        if isinstance(entry, (str, list)):
            entry = {"path": entry}
        if not isinstance(entry, Mapping):
            raise ConfigError(f"source {name!r} is {type(entry).__name__}; expected a path or a mapping with path")
        # A mixture's settings of a source change no token and no shard.
        check_keys(f"source {name!r}", entry, ("path", "split", "documents", "weight", "max_epochs"))
        path = entry.get("path")
        if not path or not isinstance(path, (str, list)):
            raise ConfigError(f"source {name!r}: path is {path!r}; expected a file, a glob or a Hub id")
        documents = entry.get("documents", "blank_line")
        check_one_of(f"source {name!r}: documents", documents, DOCUMENTS)
        return cls(name, path if isinstance(path, str) else tuple(path), str(entry.get("split", "train")), documents)


@dataclass
class CorpusConfig(EncodingConfig):
    """How documents become prepared rows; see `EncodingConfig` for the options that are not listed here.

    Attributes:
        max_length: tokens of a packed row.
        strategy: how rows are filled, see `pack_dataset`.
        overflow: what happens to a text longer than a row, see `pack_dataset`.
        eval_share: share of the documents that is held out, from 0 up to 1.
        eval_seed: decides which documents are held out, see `hold_out`.
        labels: "always" writes labels; "auto" leaves them out where every token of every text is trained.
        shard_bytes: bytes of input of a shard.
        file_format: "parquet" or "arrow".
        on_error: "raise" stops at a broken record; "skip" counts it and goes on.
        num_proc: worker processes; None for one per core.
        engine: "local" or "ray".

    Raises:
        ConfigError: a value is unknown or out of range.
    """

    # Documents are packed here, so they stay whole until then; and templates take variables from rows only.
    splits_documents: ClassVar[bool] = True  # type: ignore[misc]
    template_kwargs: ClassVar[Mapping[str, Any]] = {}  # type: ignore[misc]

    max_length: int = field(default=2048, metadata={"help": "Tokens of a row."})
    strategy: str = field(default="best_fit", metadata={"help": "best_fit, first_fit or concat."})
    overflow: str = field(default="split", metadata={"help": "Texts longer than a row: split, truncate or drop."})
    _: KW_ONLY
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
        super().__post_init__()
        check_packing(self.max_length, self.strategy, self.overflow)
        check_one_of("labels", self.labels, LABELS)
        check_one_of("on_error", self.on_error, ON_ERROR)
        check_one_of("file_format", self.file_format, FORMATS)
        check_share("eval_share", self.eval_share)
        if self.shard_bytes < 1:
            raise ConfigError(f"shard_bytes is {self.shard_bytes}; expected at least 1")

    def policy(self, tokenizer: Any) -> dict[str, Any]:
        """All that decides which rows a document becomes: equal policies give equal rows."""
        names = [option.name for option in fields(CorpusConfig) if option.name not in _NOT_POLICY]
        return {
            "preparation_version": VERSION,
            "tokenizer": tokenizer_digest(tokenizer),
            **{name: getattr(self, name) for name in names},
            "chat_template": _digest(self.chat_template or tokenizer.chat_template or ""),
        }


#: The former name of `CorpusConfig`; the same class.
CorpusSettings = CorpusConfig


def tokenizer_digest(tokenizer: Any) -> str:
    """Digest everything of a tokenizer that decides ids: its backend, byte for byte, and its special tokens."""
    special = {name: str(token) for name, token in sorted(tokenizer.special_tokens_map.items())}
    framed = tokenizer("a")["input_ids"]
    return _digest(tokenizer.backend_tokenizer.to_str() + json.dumps([special, framed], sort_keys=True))


def _digest(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)  # a template may be a list of names
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def difference(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """What two policies disagree on, one line each."""
    return [
        f"{name}: {found.get(name, 'missing')!r} there, {expected.get(name, 'missing')!r} asked for"
        for name in dict.fromkeys([*expected, *found])
        if found.get(name) != expected.get(name)
    ]
