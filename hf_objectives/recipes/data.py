"""The rows of a recipe: where they come from, which are held out, and how they become tokens."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, load_from_disk

from hf_objectives import __version__, demo
from hf_objectives.errors import ConfigError
from hf_objectives.labels import Ledger
from hf_objectives.packing import check_packing, pack_table
from hf_objectives.preparation import (
    encode_rows,
    exclusive,
    hold_out,
    is_hub_id,
    list_files,
    load_rows,
    tokenizer_digest,
)
from hf_objectives.recipes.arguments import (
    BUILT_IN,
    EncodingArguments,
    named_sources,
    option,
    read_mapping,
    read_template,
)
from hf_objectives.recipes.mixtures import HELP, read_mixture

Rows = list[dict[str, Any]]
OVERLENGTH = "the prompt's beginning goes first"  # of pairs; what the plan says
_READY, _SPLITS = "ready.pickle", ("train", "evaluation")
_OVERFLOW = "split"  # texts longer than a packed row
_EXAMPLES = 64  # encoded rows that are kept for the preview, from the beginning and from the end


@dataclass(kw_only=True)
class DataArguments(EncodingArguments):
    """Where the rows of fine-tuning come from, and how they become tokens."""

    dataset_name: str | None = option(None, "Hub id, a .json/.jsonl/.parquet/.txt file, or 'builtin'.")
    dataset_split: str = option("train", "Split of a Hub dataset.")
    sources: str | None = option(
        None, "Several named sources, a mapping of name to dataset_name, or to a mapping (JSON)."
    )
    mixture: str | None = option(None, HELP)
    eval_share: float = option(0.1, "Share of each source that is held out.")
    max_length: int = option(1024, "Tokens of a row.")
    packing: bool = option(True, "Pack several documents into a row.")
    strategy: str = option("best_fit", "best_fit or concat.")
    num_proc: int | None = option(None, "Processes that prepare data.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.mixture_settings()

    def named_sources(self) -> Mapping[str, Any]:
        """The sources by name, as they were given."""
        return named_sources(self.sources, self.dataset_name)

    def paths(self) -> dict[str, str]:
        """The path of each source.

        Raises:
            ConfigError: a source without a path.
        """
        paths = {}
        for name, source in self.named_sources().items():
            path = source.get("path") if isinstance(source, Mapping) else source
            if not isinstance(path, str):
                raise ConfigError(
                    f"a source is {source!r}; expected a path, or a mapping with path (and weight, max_epochs)"
                )
            paths[name] = path
        return paths

    def mixture_settings(self) -> dict[str, Any] | None:
        """The settings of the mixture to train on; None where the rows are trained as they are."""
        return read_mixture(self.mixture, self.named_sources())


@dataclass
class Prepared:
    """Encoded data.

    Attributes:
        train: rows to train on, packed unless they are mixed first.
        evaluation: rows to evaluate on, or None.
        examples: a few encoded rows before packing.
        ledger: what happened to every token of the rows to train on.
    """

    train: Any
    evaluation: Any
    examples: Rows
    ledger: Ledger

    def save(self, folder: Path) -> None:
        """Write it to a folder. `_READY` comes last, so that the folder is whole where that is."""
        for name in _SPLITS:
            if (rows := getattr(self, name)) is not None:
                rows.save_to_disk(str(folder / name))
        draft = folder / f"{_READY}.draft"
        draft.write_bytes(pickle.dumps((self.examples, self.ledger)))
        draft.replace(folder / _READY)

    @classmethod
    def load(cls, folder: Path) -> Prepared:
        """Read what `save` wrote; the rows are mapped from disk."""
        examples, ledger = pickle.loads((folder / _READY).read_bytes())
        train, evaluation = (
            load_from_disk(str(folder / name)) if (folder / name).exists() else None for name in _SPLITS
        )
        return cls(train, evaluation, examples, ledger)


def prepare(data: DataArguments, tokenizer: Any, *, seed: int, output_dir: str) -> Prepared:
    """Load, split, encode and pack every source.

    In a launch of several processes one of them does it, in a folder of the run, while the others wait on its lock. The
    tokenizer gets the chat template that `data` names.
    """
    set_template(tokenizer, data.chat_template)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return _prepare(data, tokenizer, seed=seed)
    # Weights change no token.
    mixed = data.mixture_settings() is not None
    settings = {
        **asdict(data),
        **{"num_proc": None, "chat_template": tokenizer.chat_template, "sources": data.paths(), "mixture": mixed},
    }
    versions = [_version(path, data.dataset_split) for path in data.paths().values()]
    fingerprint = json.dumps([settings, seed, tokenizer_digest(tokenizer), versions], sort_keys=True)
    folder = Path(output_dir) / "prepared" / hashlib.sha256(fingerprint.encode()).hexdigest()[:20]
    with exclusive(folder, lambda: "encoding rows"):
        if not (folder / _READY).exists():
            _prepare(data, tokenizer, seed=seed).save(folder)
    return Prepared.load(folder)


def set_template(tokenizer: Any, chat_template: str | None) -> None:
    """Give the tokenizer a chat template; it is saved with the model, so that inference renders what was trained."""
    if template := read_template(chat_template):
        tokenizer.chat_template = template


def _version(path: str, split: str) -> Any:
    """A value that changes when the rows of a source do."""
    if path == BUILT_IN:
        return __version__
    if is_hub_id(path):
        return load_rows(path, split=split)._fingerprint  # type: ignore[union-attr]
    stats = {file: Path(file).stat() for file in list_files(path)}
    return [(file, stat.st_size, stat.st_mtime_ns) for file, stat in stats.items()]


def _prepare(data: DataArguments, tokenizer: Any, *, seed: int) -> Prepared:
    if data.packing:
        check_packing(data.max_length, data.strategy, _OVERFLOW)
    train: Rows = []
    held_out: Rows = []
    for name, path in data.paths().items():
        if path == BUILT_IN:
            train += demo.chats(14_000, seed=seed)
            held_out += demo.chats(400, seed=seed, split="test")
            continue
        kept, out = _split(path, name, data.dataset_split, data.eval_share, seed)
        train += kept
        held_out += out
    ledger = Ledger()
    # A mixture packs the documents that it draws.
    packing = data.packing and data.mixture_settings() is None
    encoded = _encode(data, train, tokenizer, packing, ledger)
    ends = [encoded.slice(0, _EXAMPLES), encoded.slice(max(_EXAMPLES, len(encoded) - _EXAMPLES))]
    examples = pa.concat_tables(ends).to_pylist()
    evaluation = None
    if held_out:
        evaluation = _pack(data, _encode(data, held_out, tokenizer, data.packing, Ledger()), data.packing)
    return Prepared(_pack(data, encoded, packing), evaluation, examples, ledger)


def _encode(data: DataArguments, rows: Rows, tokenizer: Any, packing: bool, ledger: Ledger) -> pa.Table:
    # The tokenizer has the template by now.
    options = replace(data.encoding(), chat_template=None, splits_documents=packing)
    return encode_rows(rows, tokenizer, options, source="data", num_proc=data.num_proc, ledger=ledger)


def _pack(data: DataArguments, encoded: pa.Table, packing: bool) -> Dataset:
    return Dataset(
        pack_table(encoded, data.max_length, strategy=data.strategy, overflow=_OVERFLOW) if packing else encoded
    )


def _split(path: str, source: str, split: str, eval_share: float, seed: int) -> tuple[Rows, Rows]:
    """Rows to train on and rows held out, each with its source and its number there."""
    rows = load_rows(path, split=split)
    train, held_out = (
        [{**rows[i], "source": source, "row": i} for i in part] for part in hold_out(rows, eval_share, seed=seed)
    )
    return train, held_out


@dataclass
class RowArguments:
    """Where the rows of alignment come from."""

    dataset_name: str = option(BUILT_IN, "Rows: a Hub id, a file, or 'builtin'.")
    dataset_split: str = option("train", "Split of a Hub dataset.")
    eval_share: float = option(0.1, "Share of the rows that is held out.")


@dataclass
class WatchedArguments(RowArguments):
    """Rows of alignment, and rows whose perplexity is watched beside them."""

    lm_datasets: str | None = option(
        None, "Rows whose perplexity is watched: a mapping of name to file, Hub id or 'builtin' (JSON)."
    )

    def watched(self) -> dict[str, Any] | None:
        """The rows that are watched, by name.

        Raises:
            ConfigError: not a mapping, or a part that the built-in corpus does not have.
        """
        if not self.lm_datasets:
            return None
        built_in = {"texts": demo.texts, "chats": demo.chats}
        rows: dict[str, Any] = {}
        for name, path in read_mapping("lm_datasets", self.lm_datasets).items():
            if path == BUILT_IN and name not in built_in:
                raise ConfigError(
                    f"lm_datasets: {name!r} is 'builtin'; the built-in corpus has {' and '.join(built_in)}"
                )
            rows[name] = built_in[name](200, split="test") if path == BUILT_IN else load_rows(path)
        return rows


def split_rows(data: RowArguments, *, seed: int, built_in: tuple[int, int]) -> tuple[Rows, Rows]:
    """Rows to train on and rows held out, each with its `source` and its number there in `row`.

    Args:
        data: where they come from.
        seed: decides which are held out.
        built_in: how many built-in preference rows to train on, and how many to hold out.

    Raises:
        FileFormatError: a file that cannot be read.
        ConfigError: an `eval_share` that leaves nothing to train on.
    """
    if data.dataset_name != BUILT_IN:
        return _split(data.dataset_name, Path(data.dataset_name).name, data.dataset_split, data.eval_share, seed)
    parts = (demo.preferences(built_in[0], seed=seed), demo.preferences(built_in[1], seed=seed, split="test"))
    train, held_out = ([{**row, "source": BUILT_IN, "row": i} for i, row in enumerate(part)] for part in parts)
    return train, held_out
