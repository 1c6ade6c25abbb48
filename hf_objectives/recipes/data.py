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
from hf_objectives.labels import SKIPPED, Account, Ledger
from hf_objectives.mixture import DatasetMixture, MixtureConfig, build_mixture
from hf_objectives.packing import check_packing, pack_table
from hf_objectives.preparation import (
    MANIFEST,
    OrderedStream,
    Place,
    encode_rows,
    exclusive,
    hold_out,
    is_hub_id,
    load_rows,
    local_files,
    naming_places,
    tokenizer_digest,
)
from hf_objectives.recipes.arguments import (
    BUILT_IN,
    read_template,
)
from hf_objectives.recipes.built_in import built_in_rows, is_built_in, pair_rows
from hf_objectives.recipes.data_arguments import DataArguments, RowArguments
from hf_objectives.types import Row, parse_json

logger = logging.getLogger(__name__)
Rows = list[dict[str, Any]]
_READY, _SPLITS = "ready.json", ("train", "evaluation")
_OVERFLOW = "split"  # texts longer than a packed row
_EXAMPLES = 64  # encoded rows that are kept for the preview, from the beginning and from the end


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
    set_tokens(tokenizer, eos_token=data.eos_token, pad_token=data.pad_token)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return _prepare(data, tokenizer, seed=seed)
    # Weights change no token.
    places = {name: asdict(place) for name, place in data.places().items()}
    mixed = data.mixture_settings() is not None
    settings = {
        **asdict(data),
        **{
            "num_proc": None,
            "chat_template": tokenizer.chat_template,
            "sources": places,
            "mixture": mixed,
        },
    }
    versions = [_version(place) for place in data.places().values()]
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


def set_tokens(tokenizer: Any, **tokens: str | None) -> None:
    """Give the tokenizer special tokens of its vocabulary, by names such as `eos_token`; None leaves one as it is.

    Raises:
        ConfigError: a token that the vocabulary has not.
    """
    for name, token in tokens.items():
        if token is None:
            continue
        if token not in tokenizer.get_vocab():
            raise ConfigError(
                f"{name} is {token!r}, which the tokenizer does not have; expected a token of its vocabulary"
            )
        setattr(tokenizer, name, token)


def _version(place: Place) -> Any:
    """A value that changes when the rows of a source do."""
    if is_built_in(place.path):
        return __version__
    if place.on_hub:
        return load_rows(place)._fingerprint  # type: ignore[union-attr]
    stats = {file: Path(file).stat() for file in local_files(place.path)}
    return [(file, stat.st_size, stat.st_mtime_ns) for file, stat in stats.items()]


def _prepare(data: DataArguments, tokenizer: Any, *, seed: int) -> Prepared:
    if data.packing:
        check_packing(data.max_length, data.strategy, _OVERFLOW)
    train: Rows = []
    held_out: Rows = []
    sizes: dict[str, int] = {}
    for name, place in data.places().items():
        if is_built_in(place.path):
            named = {} if len(data.places()) == 1 else {"source": name}
            train += [{**row, **named} for row in built_in_rows(place.path, data.built_in_rows, seed=seed)]
            sizes[name] = data.built_in_rows
            held_out += [{**row, **named} for row in built_in_rows(place.path, 400, seed=seed, split="test")]
            continue
        kept, out = _split(place, name, data, seed)
        sizes[name] = len(kept)
        train += kept
        held_out += out
    if (shares := data.fractions()) and len(shares) > 1:
        train = _first_rows(train, sizes, shares)
    ledger = Ledger()
    # A mixture packs the documents that it draws.
    packing = data.packing and data.mixture_settings() is None
    paths = {name: place.path for name, place in data.places().items()}
    with naming_places({name: path for name, path in paths.items() if not is_built_in(path)}):
        encoded = _encode(data, train, tokenizer, packing, ledger)
        evaluation = _encode(data, held_out, tokenizer, data.packing, Ledger()) if held_out else None
    ends = [encoded.slice(0, _EXAMPLES), encoded.slice(max(_EXAMPLES, len(encoded) - _EXAMPLES))]
    examples = pa.concat_tables(ends).to_pylist()
    held = None if evaluation is None else _pack(data, evaluation, data.packing)
    return Prepared(_pack(data, encoded, packing), held, examples, ledger)


def _first_rows(rows: Rows, sizes: Mapping[str, int], shares: Mapping[str, float]) -> Rows:
    """The first rows of each source: as many as give each its share, where none gives more than it has; as TRL counts."""
    total = min(sizes[name] / share for name, share in shares.items())
    left = {name: round(share * total) for name, share in shares.items()}
    kept = []
    for row in rows:
        if left[row["source"]] > 0:
            left[row["source"]] -= 1
            kept.append(row)
    return kept


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


def _split(place: Place, source: str, data: DataArguments | RowArguments, seed: int) -> tuple[Rows, Rows]:
    """Rows to train on and rows held out, each with its source and its number there.

    `dataset_test_split` of a dataset of the Hub is held out as a whole; of others `eval_share`.
    """
    rows = load_rows(place)
    if data.dataset_test_split and place.on_hub:
        test = load_rows(replace(place, split=data.dataset_test_split))
        parts = [(found, list(range(len(found)))) for found in (rows, test)]
    else:
        parts = [(rows, part) for part in hold_out(rows, data.eval_share, seed=seed)]
    train, held_out = ([{**found[i], "source": source, "row": i} for i in part] for found, part in parts)
    return train, held_out


def split_rows(
    data: RowArguments, *, seed: int, built_in: tuple[int, int], skills: Sequence[str] | None = None
) -> tuple[Rows, Rows]:
    """Rows to train on and rows held out, each with its `source` and its number there in `row`.

    Of built-in rows, `built_in` says how many to train on and to hold out, and `skills` of which skills they are.
    """
    if is_built_in(data.dataset_name):
        return pair_rows(data.dataset_name, built_in, seed=seed, skills=skills)
    name = Path(data.dataset_name).name
    return _split(data.place(name, data.dataset_name), name, data, seed)


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
                stats = [Path(file).stat() for file in local_files(path)]  # reading terabytes would take hours
                files += [(stat.st_size, stat.st_mtime_ns) for stat in stats]
    return sha256([asdict(config), files])


def sha256(values: Any) -> str:
    """A checksum of JSON values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


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
