"""The rows of a recipe: where they come from, which are held out, how they become tokens, and how sources are mixed."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, load_from_disk
from tqdm.auto import tqdm

from hf_objectives import __version__
from hf_objectives.errors import ConfigError, DataError, PreparedDataError
from hf_objectives.labels import ON_ERROR, SKIPPED, Account, Ledger
from hf_objectives.mixture import DatasetMixture, MixtureConfig, build_mixture
from hf_objectives.packing import check_packing, pack_table
from hf_objectives.preparation import (
    MANIFEST,
    OrderedStream,
    check_share,
    encode_rows,
    exclusive,
    hold_out,
    is_hub_id,
    list_files,
    load_rows,
    naming_places,
    tokenizer_digest,
)
from hf_objectives.recipes.arguments import (
    BUILT_IN,
    MIXTURE_KEYS,
    EncodingArguments,
    named_sources,
    read_mapping,
    read_template,
    source_place,
)
from hf_objectives.recipes.built_in import built_in_rows, is_built_in, pair_rows, watched_rows
from hf_objectives.types import Row, check_one_of, option, parse_json, parse_yaml

logger = logging.getLogger(__name__)
Rows = list[dict[str, Any]]
_READY, _SPLITS = "ready.json", ("train", "evaluation")
_OVERFLOW = "split"  # texts longer than a packed row
MIXTURE_HELP = "Weights: a mixture's settings (JSON, or a YAML file) for the sources, or with sources of its own."
_ON_ERROR = "A row that cannot be used: raise its error, or skip and count it."
_EXAMPLES = 64  # encoded rows that are kept for the preview, from the beginning and from the end


@dataclass(kw_only=True)
class DataArguments(EncodingArguments):
    """Where the rows of fine-tuning come from, and how they become tokens."""

    dataset_name: str | None = option(
        None, "Hub id, a .json/.jsonl/.parquet/.txt file, 'builtin', 'builtin:careless' or 'builtin:texts'."
    )
    built_in_rows: int = option(30_000, "Rows of a built-in source.")
    dataset_split: str = option("train", "Split of a Hub dataset.")
    sources: str | None = option(None, "Names and paths, or mappings with path, split, weight and max_epochs (JSON).")
    mixture: str | None = option(None, MIXTURE_HELP)
    eval_share: float = option(0.1, "Share of each source that is held out.")
    max_length: int = option(1024, "Tokens of a row.")
    packing: bool = option(True, "Pack several documents into a row.")
    strategy: str = option("best_fit", "best_fit or concat.")
    num_proc: int | None = option(None, "Processes that prepare data.")
    on_error: str = option("raise", _ON_ERROR)
    allow_no_stop: bool = option(False, "Train also where most of the assistant's turns end without a control token.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_of("on_error", self.on_error, ON_ERROR)
        check_share("eval_share", self.eval_share)
        self.places()
        self.mixture_settings()

    def named_sources(self) -> Mapping[str, Any]:
        """The sources by name, as they were given."""
        return named_sources(self.sources, self.dataset_name)

    def places(self) -> dict[str, tuple[str, str]]:
        """The path and the split of each source, see `source_place`."""
        return {name: source_place(name, source, self.dataset_split) for name, source in self.named_sources().items()}

    def mixture_settings(self) -> dict[str, Any] | None:
        """The settings of the mixture to train on; None where the rows are trained as they are."""
        return read_mixture(self.mixture, self.named_sources())


@dataclass
class Prepared:
    """Encoded rows to train on, packed unless they are mixed first, and to evaluate on.

    `examples` are a few before packing; the ledger says what happened to every token to train on.
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
        draft.write_text(json.dumps({"examples": self.examples, "ledger": self.ledger.to_dict()}), encoding="utf-8")
        draft.replace(folder / _READY)

    @classmethod
    def load(cls, folder: Path) -> Prepared:
        """Read what `save` wrote; the rows are mapped from disk."""
        try:
            kept = parse_json((folder / _READY).read_bytes())
            examples, ledger = list(kept["examples"]), Ledger.from_dict(kept["ledger"])
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise PreparedDataError(
                f"{folder / _READY} is damaged ({type(error).__name__}: {error!s:.200}); delete {folder} and prepare again"
            ) from error
        train, evaluation = (
            load_from_disk(str(folder / name)) if (folder / name).exists() else None for name in _SPLITS
        )
        return cls(train, evaluation, examples, ledger)


def prepare(data: DataArguments, tokenizer: Any, *, seed: int, output_dir: str) -> Prepared:
    """Load, split, encode and pack every source; the tokenizer gets the chat template that `data` names.

    In a launch of several processes one of them does it, in a folder of the run, while the others wait on its lock.
    """
    set_template(tokenizer, data.chat_template)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return _prepare(data, tokenizer, seed=seed)
    # Weights change no token.
    mixed = data.mixture_settings() is not None
    settings = {
        **asdict(data),
        **{"num_proc": None, "chat_template": tokenizer.chat_template, "sources": data.places(), "mixture": mixed},
    }
    versions = [_version(*place) for place in data.places().values()]
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
    if is_built_in(path):
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
    for name, (path, split) in data.places().items():
        if is_built_in(path):
            named = {} if len(data.places()) == 1 else {"source": name}
            train += [{**row, **named} for row in built_in_rows(path, data.built_in_rows, seed=seed)]
            held_out += [{**row, **named} for row in built_in_rows(path, 400, seed=seed, split="test")]
            continue
        kept, out = _split(path, name, split, data.eval_share, seed)
        train += kept
        held_out += out
    ledger = Ledger()
    # A mixture packs the documents that it draws.
    packing = data.packing and data.mixture_settings() is None
    with naming_places({name: path for name, (path, _) in data.places().items() if not is_built_in(path)}):
        encoded = _encode(data, train, tokenizer, packing, ledger)
        evaluation = _encode(data, held_out, tokenizer, data.packing, Ledger()) if held_out else None
    ends = [encoded.slice(0, _EXAMPLES), encoded.slice(max(_EXAMPLES, len(encoded) - _EXAMPLES))]
    examples = pa.concat_tables(ends).to_pylist()
    held = None if evaluation is None else _pack(data, evaluation, data.packing)
    return Prepared(_pack(data, encoded, packing), held, examples, ledger)


def _encode(data: DataArguments, rows: Rows, tokenizer: Any, packing: bool, ledger: Ledger) -> pa.Table:
    # The tokenizer has the template by now.
    options = replace(data.encoding(), chat_template=None, splits_documents=packing)
    return encode_rows(
        rows, tokenizer, options, source="data", num_proc=data.num_proc, ledger=ledger, on_error=data.on_error
    )


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
    on_error: str = option("raise", _ON_ERROR)
    packing, overlength = False, "the prompt's beginning goes first"  # what the plan says

    def __post_init__(self) -> None:
        check_one_of("on_error", self.on_error, ON_ERROR)
        check_share("eval_share", self.eval_share)


@dataclass
class WatchedArguments(RowArguments):
    """Rows of alignment, and rows whose perplexity is watched beside them."""

    lm_datasets: str | None = option(
        None, "Rows whose perplexity is watched: a mapping of name to file, Hub id or 'builtin' (JSON)."
    )

    def watched(self) -> dict[str, Any] | None:
        """The rows that are watched, by name."""
        if not self.lm_datasets:
            return None
        named = read_mapping("lm_datasets", self.lm_datasets).items()
        return {name: watched_rows(name, path) if is_built_in(path) else load_rows(path) for name, path in named}


def split_rows(
    data: RowArguments, *, seed: int, built_in: tuple[int, int], skills: Sequence[str] | None = None
) -> tuple[Rows, Rows]:
    """Rows to train on and rows held out, each with its `source` and its number there in `row`.

    Of built-in rows, `built_in` says how many to train on and to hold out, and `skills` of which skills they are.
    """
    if is_built_in(data.dataset_name):
        return pair_rows(data.dataset_name, built_in, seed=seed, skills=skills)
    return _split(data.dataset_name, Path(data.dataset_name).name, data.dataset_split, data.eval_share, seed)


def usable_rows(data: RowArguments, rows: Rows, use: Callable[[Row], Row], account: Account | None = None) -> Rows:
    """What `use` makes of each row, with the row's `source` and number in `row`.

    `account` counts rows and those left out; without one, what is left out is logged.

    Raises:
        DataError: a row that cannot be used, unless `on_error` is "skip"; then, that there is no other.
    """
    counted, of_part = (Account(), ", held out") if account is None else (account, "")
    made: Rows = []
    with naming_places({} if data.dataset_name == BUILT_IN else {Path(data.dataset_name).name: data.dataset_name}):
        # A bar after five seconds, on terminals alone.
        for row in tqdm(rows, desc="Encoding", unit="row", delay=5, disable=None):
            counted.rows_in += 1
            try:
                made.append({**use(row), "source": row["source"], "row": row["row"]})
            except DataError as error:
                if data.on_error == "raise":
                    raise
                counted.drop(type(error).__name__ + SKIPPED, tokens=0, row=row["row"])
                last = error
        if rows and not made:
            last.reason = f"none of {len(rows)} rows can be used{of_part}; of the last one: {last.reason}"
            raise last
    counted.rows_out = len(made)
    for reason, numbers in counted.dropped_examples.items() if account is None else ():
        first = ", ".join(map(str, numbers))
        logger.warning(
            "%s, held out: %d rows left out (%s; rows %s)",
            *(data.dataset_name, counted.dropped_rows[reason], reason, first),
        )
    return made


def digest(rows: Dataset) -> str:
    """A checksum of all numbers in encoded rows, the same for rows in memory and on disk."""
    sums: dict[tuple[str, int], Any] = defaultdict(hashlib.sha256)  # tables are cut into chunks anywhere
    for name in rows.column_names:
        for chunk in rows.data[name].chunks:
            depth = 0
            while pa.types.is_list(chunk.type) or pa.types.is_large_list(chunk.type):
                sums[name, depth].update(np.asarray(chunk.value_lengths(), np.int64).data)
                chunk, depth = chunk.flatten(), depth + 1
            if pa.types.is_integer(chunk.type):
                sums[name, depth].update(np.asarray(chunk, np.int64).data)
    return sha256([(*place, summed.hexdigest()) for place, summed in sorted(sums.items())])


def digest_of_stream(rows: OrderedStream, content: Any, seed: int) -> str:
    """A checksum of what a stream is made of (`content`, JSON values) and of what its order follows from."""
    mixed = [rows.state_dict(0)["mixture"], rows.blocklist] if isinstance(rows, DatasetMixture) else None
    return sha256([content, mixed, seed])


def digest_of_mixture(settings: Mapping[str, Any]) -> str:
    """A checksum of a mixture's settings, and of sizes and times of the files that they name; not of datasets of the Hub."""
    config = MixtureConfig.read(settings)
    files: list[Any] = []
    for source in config.sources:
        named = source.path or source.data_files or ()
        for path in [named] if isinstance(named, str) else named:
            manifest = Path(path) / MANIFEST
            if manifest.is_file():  # it has the checksums of its shards
                files.append(manifest.read_text(encoding="utf-8"))
            elif not is_hub_id(path):
                stats = [Path(file).stat() for file in list_files(path)]  # reading terabytes would take hours
                files += [(stat.st_size, stat.st_mtime_ns) for stat in stats]
    return sha256([asdict(config), files])


def sha256(values: Any) -> str:
    """A checksum of JSON values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def read_mixture(mixture: str | None, sources: Mapping[str, Any]) -> dict[str, Any] | None:
    """The settings of a mixture, with the weights beside the sources; None where nothing asks for one.

    `mixture` is JSON text of a mapping or the path of a YAML file; `sources` are paths or mappings.
    """
    beside = {name: source_settings(source) for name, source in sources.items()}
    if not mixture and not any(beside.values()):
        return None
    settings = _mixture_settings(mixture) if mixture else {}
    if not sources:
        return settings
    own = settings.get("sources") or {}
    if not isinstance(own, dict) or not all(source is None or isinstance(source, dict) for source in own.values()):
        raise ConfigError(f"mixture: sources is {own!r}; expected names with weight and max_epochs")
    for name in own:
        if name not in sources:
            raise ConfigError(f"mixture names source {name!r}; expected one of {', '.join(sources)}")
    return {**settings, "sources": {name: {**beside[name], **(own.get(name) or {})} for name in sources}}


def source_settings(source: Any) -> dict[str, Any]:
    """Of a source, what the mixture reads: its weight and its epochs, where it has them."""
    return {key: source[key] for key in MIXTURE_KEYS if key in source} if isinstance(source, Mapping) else {}


def _mixture_settings(mixture: str) -> dict[str, Any]:
    is_json = mixture.lstrip().startswith("{")
    if not is_json and not Path(mixture).is_file():
        raise ConfigError(f"mixture names a file that does not exist: {mixture}")
    try:
        settings = parse_json(mixture) if is_json else parse_yaml(Path(mixture).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"mixture cannot be read: {error}") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"mixture is {type(settings).__name__}; expected a mapping, see MixtureConfig")
    return settings


def mix_folder(settings: Mapping[str, Any], folder: Path, tokenizer: Any, seed: int) -> DatasetMixture:
    """Mix the sources of a prepared folder."""
    sources = {name: {"path": str(folder), **source} for name, source in settings["sources"].items()}
    return build_mixture({**settings, "sources": sources}, tokenizer=tokenizer, seed=seed)


def mix_rows(
    settings: Mapping[str, Any], rows: Dataset, *, max_length: int, packing: bool, seed: int
) -> DatasetMixture:
    """Mix encoded rows by their `source` column; pack across sources unless the settings say otherwise."""
    names = np.array(rows["source"][:])
    sources = {}
    for name, source in settings["sources"].items():
        numbers = np.flatnonzero(names == name)
        if not len(numbers):
            raise ConfigError(f"source {name!r} has no row to train on; take it out")
        sources[name] = {"dataset": rows.select(numbers).remove_columns("source"), **source}
    packed = {"packing": "across", "max_length": max_length} if packing else {}
    return build_mixture(MixtureConfig.read({**packed, **settings, "sources": sources}), seed=seed)
