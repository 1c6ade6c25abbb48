"""The rows of a recipe: where they come from, which are held out, how they become tokens, and how sources are mixed."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset
from tqdm.auto import tqdm

from hf_objectives import __version__
from hf_objectives.errors import ConfigError, DataError, PreparedDataError
from hf_objectives.labels import SKIPPED, Account, Ledger
from hf_objectives.mixture import DatasetMixture, MixtureConfig, build_mixture
from hf_objectives.packing import check_packing, pack_tables
from hf_objectives.preparation import (
    MANIFEST,
    ChainedRows,
    OrderedStream,
    Place,
    SelectedRows,
    are_held_out,
    disk_full,
    encode_rows,
    exclusive,
    is_hub_id,
    local_files,
    naming_places,
    store_rows,
    tokenizer_digest,
    write_tables,
)
from hf_objectives.recipes.arguments import (
    BUILT_IN,
    read_template,
)
from hf_objectives.recipes.built_in import built_in_rows, is_built_in, pair_rows
from hf_objectives.recipes.data_arguments import DataArguments, RowArguments
from hf_objectives.types import Row, parse_json

logger = logging.getLogger(__name__)
Rows = list[dict[str, Any]] | SelectedRows
_READY = "ready.json"
_OVERFLOW = "split"  # texts longer than a packed row
_ROWS_AT_ONCE = 4_096  # that are written at a time
_EXAMPLES = 64  # encoded rows that are kept for the preview, from the beginning and from the end


@dataclass
class Prepared:
    """Encoded rows to train on, packed unless they are mixed first, and to evaluate on; both are mapped from disk.

    `examples` are a few before packing; the ledger says what happened to every token to train on.
    """

    train: Dataset
    evaluation: Dataset | None
    examples: list[dict[str, Any]]
    ledger: Ledger

    @classmethod
    def load(cls, folder: Path) -> Prepared:
        """Read what `prepare` wrote."""
        try:
            kept = parse_json((path := folder / _READY).read_bytes())
            examples, ledger = list(kept["examples"]), Ledger.from_dict(kept["ledger"])
            splits = {}
            for name in kept["splits"]:
                path = folder / f"{name}.arrow"
                splits[name] = Dataset.from_file(str(path))
            return cls(splits["train"], splits.get("evaluation"), examples, ledger)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise PreparedDataError(
                f"{path} is damaged ({type(error).__name__}: {error!s:.200}); delete {folder} and prepare again"
            ) from error


def prepare(data: DataArguments, tokenizer: Any, *, seed: int, output_dir: str, keep: bool = True) -> Prepared:
    """Load, split, encode and pack every source; the tokenizer gets the chat template that `data` names.

    The rows lie in a folder of the run. One process makes it, while the others of a launch wait on its lock; a later launch
    with the same data and settings finds it. Without `keep` nothing is written there.
    """
    set_template(tokenizer, data.chat_template)
    set_tokens(tokenizer, eos_token=data.eos_token, pad_token=data.pad_token)
    # Weights change no token.
    places = {name: asdict(place) for name, place in data.places().items()}
    settings = {
        **asdict(data),
        "num_proc": None,
        "chat_template": tokenizer.chat_template,
        "sources": places,
        "mixture": data.mixture_settings() is not None,
        "order": list(places),
        "fractions": data.fractions(),
    }
    versions = [_version(place) for place in data.places().values()]
    name = sha256([__version__, settings, seed, tokenizer_digest(tokenizer), versions])[:20]
    folder = Path(output_dir) / "prepared" / name
    if not keep and not (folder / _READY).exists():
        with TemporaryDirectory() as other:
            _prepare(data, tokenizer, seed, Path(other))
            return Prepared.load(Path(other))  # memory-mapped files stay readable after they are unlinked
    with exclusive(folder, lambda: "encoding rows"):
        if not (folder / _READY).exists():
            _prepare(data, tokenizer, seed, folder)
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
        return None
    if place.on_hub:
        return place.version()
    stats = {file: Path(file).stat() for file in local_files(place.path)}
    return [(file, stat.st_size, stat.st_mtime_ns) for file, stat in stats.items()]


def _prepare(data: DataArguments, tokenizer: Any, seed: int, folder: Path) -> None:
    """Write the rows to a folder. `_READY` comes last, so that the folder is whole where that is."""
    if data.packing:
        check_packing(data.max_length, data.strategy, _OVERFLOW)
    parts = {name: _split(place, name, data, seed) for name, place in data.places().items()}
    train, held_out = ({name: part[side] for name, part in parts.items()} for side in (0, 1))
    if (shares := data.fractions()) and len(shares) > 1:
        train = _first_rows(train, shares)
    ledger = Ledger()
    # A mixture packs the documents that it draws.
    packing = data.packing and data.mixture_settings() is None
    paths = {name: place.path for name, place in data.places().items() if not is_built_in(place.path)}
    with naming_places(paths):
        encoded = _encode(data, train, tokenizer, packing, ledger, folder)
        evaluation = (
            _encode(data, held_out, tokenizer, data.packing, Ledger(), folder) if any(held_out.values()) else None
        )
    splits = {"train": _packed(data, encoded, packing)}
    if evaluation is not None:
        splits["evaluation"] = _packed(data, evaluation, data.packing)
    for name, tables in splits.items():
        write_table(folder / f"{name}.arrow", tables)
    ends = [encoded.slice(0, _EXAMPLES), encoded.slice(max(_EXAMPLES, len(encoded) - _EXAMPLES))]
    ready = {"splits": list(splits), "examples": pa.concat_tables(ends).to_pylist(), "ledger": ledger.to_dict()}
    draft = folder / f"{_READY}.draft"
    draft.write_text(json.dumps(ready), encoding="utf-8")
    draft.replace(folder / _READY)


def _first_rows(parts: Mapping[str, Rows], shares: Mapping[str, float]) -> dict[str, Rows]:
    """The first rows of each source: as many as give each its share, where none gives more than it has; as TRL counts."""
    total = min(len(parts[name]) / share for name, share in shares.items())
    counts = {name: round(share * total) for name, share in shares.items()}
    return {
        name: part[: counts[name]] if isinstance(part, list) else part.first(counts[name])
        for name, part in parts.items()
    }


def _encode(
    data: DataArguments, parts: Mapping[str, Rows], tokenizer: Any, packing: bool, ledger: Ledger, folder: Path
) -> pa.Table:
    # The tokenizer has the template by now.
    options = replace(data.encoding(), chat_template=None, splits_documents=packing)
    more: dict[str, Any] = {"num_proc": data.num_proc, "ledger": ledger, "on_error": data.on_error, "folder": folder}
    return encode_rows(ChainedRows(list(parts.values())), tokenizer, options, source="data", **more)


def _packed(data: DataArguments, encoded: pa.Table, packing: bool) -> Iterator[pa.Table]:
    """The rows as they are trained, some at a time."""
    if packing:
        return pack_tables(encoded, data.max_length, _ROWS_AT_ONCE, strategy=data.strategy, overflow=_OVERFLOW)
    return (encoded.slice(begin, _ROWS_AT_ONCE) for begin in range(0, len(encoded), _ROWS_AT_ONCE))


def write_table(path: Path, tables: Iterable[pa.Table]) -> None:
    """Write tables to one file, of the form that `datasets` maps into memory.

    Raises:
        DiskFullError: the folder has no room.
    """
    rest = iter(tables)
    first = next(rest)
    try:
        write_tables(str(path), first.schema, itertools.chain([first], rest))
    except OSError as error:
        raise disk_full(error, path) from error


def _split(place: Place, source: str, data: DataArguments | RowArguments, seed: int) -> tuple[Rows, Rows]:
    """Rows to train on and rows held out, each with its source and its number there.

    `dataset_test_split` of a dataset of the Hub is held out as a whole; of others `eval_share`. Several sources of which one
    is built in name it; alone, its rows name their own.
    """
    if is_built_in(place.path):
        assert isinstance(data, DataArguments)
        named = {} if len(data.places()) == 1 else {"source": source}
        made = (
            built_in_rows(place.path, data.built_in_rows, seed=seed),
            built_in_rows(place.path, 400, seed=seed, split="test"),
        )
        train, held_out = ([{**row, **named} for row in rows] for rows in made)
        return train, held_out
    rows = store_rows(place)
    if data.dataset_test_split and place.on_hub:
        test = store_rows(replace(place, split=data.dataset_test_split))
        return SelectedRows(rows, np.arange(len(rows)), source), SelectedRows(test, np.arange(len(test)), source)
    held = are_held_out(rows, data.eval_share, seed=seed)
    return SelectedRows(rows, np.flatnonzero(~held), source), SelectedRows(rows, np.flatnonzero(held), source)


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


def usable_rows(
    data: RowArguments, rows: Rows, use: Callable[[Row], Row], account: Account | None = None
) -> Iterator[dict[str, Any]]:
    """Yield what `use` makes of each row, with the row's `source` and number in `row`.

    `account` counts rows and those left out; without one, what is left out is logged.

    Raises:
        DataError: a row that cannot be used, unless `on_error` is "skip"; then, that there is no other.
    """
    counted, of_part = (Account(), ", held out") if account is None else (account, "")
    with naming_places({} if data.dataset_name == BUILT_IN else {Path(data.dataset_name).name: data.dataset_name}):
        # A bar after five seconds, on terminals alone.
        for row in tqdm(rows, desc="Encoding", unit="row", delay=5, disable=None):
            counted.rows_in += 1
            try:
                made = {**use(row), "source": row["source"], "row": row["row"]}
            except DataError as error:
                if data.on_error == "raise":
                    raise
                counted.drop(type(error).__name__ + SKIPPED, tokens=0, row=row["row"])
                last = error
                continue
            counted.rows_out += 1
            yield made
        if rows and not counted.rows_out:
            last.reason = f"none of {len(rows)} rows can be used{of_part}; of the last one: {last.reason}"
            raise last
    for reason, numbers in counted.dropped_examples.items() if account is None else ():
        first = ", ".join(map(str, numbers))
        logger.warning(
            "%s, held out: %d rows left out (%s; rows %s)",
            *(data.dataset_name, counted.dropped_rows[reason], reason, first),
        )


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
    coded = rows.data["source"].combine_chunks().dictionary_encode()
    names = coded.dictionary.to_pylist()
    sources = {}
    for name, source in settings["sources"].items():
        numbers: Any = np.flatnonzero(coded.indices.to_numpy() == names.index(name)) if name in names else []
        if not len(numbers):
            raise ConfigError(f"source {name!r} has no row to train on; take it out")
        sources[name] = {"dataset": rows.select(numbers).remove_columns("source"), **source}
    packed = {"packing": "across", "max_length": max_length} if packing else {}
    return build_mixture(MixtureConfig.read({**packed, **settings, "sources": sources}), seed=seed)
