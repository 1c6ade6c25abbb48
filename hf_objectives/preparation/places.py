"""Where the rows of a source lie: files, an object store, or a dataset of the Hub with subset, revision and split."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import fsspec
from datasets import Dataset, config, get_dataset_config_names, load_dataset, load_dataset_builder
from datasets.exceptions import DatasetsError

from hf_objectives.errors import ConfigError, FileFormatError, nearest
from hf_objectives.preparation import files
from hf_objectives.types import check_keys

_ERRORS = (DatasetsError, ConnectionError, ValueError, TypeError, OSError)  # those of Arrow are ValueErrors
Files = str | Sequence[str] | Mapping[str, Any] | None


@dataclass(frozen=True)
class Place:
    """Where rows lie.

    Attributes:
        path: a file, folder or glob, an address of an object store (`s3://...`, by fsspec), or a dataset of the Hub.
        split: of a dataset of the Hub: a name, or an expression as `load_dataset` takes it (`train[:10%]`, `train+test`).
        config, revision, data_files, data_dir: of a dataset of the Hub, see `datasets.load_dataset`.
        column_mapping: our name of a column by its name there (`{"question": "prompt"}`); other columns keep their names.
        columns: the columns to keep, by their names there; None keeps all.
        streaming: of a dataset of the Hub: read it as a stream, without a copy in the cache.
    """

    path: str
    split: str = "train"
    config: str | None = None
    revision: str | None = None
    data_files: Files = None
    data_dir: str | None = None
    column_mapping: Mapping[str, str] | None = None
    columns: Sequence[str] | None = None
    streaming: bool = False

    @classmethod
    def read(cls, name: str, source: Any, default: Place, others: Sequence[str] = ()) -> Place:
        """The place of a source that is a path, or a mapping of the attributes; what it does not name is as in `default`.

        Raises:
            ConfigError: no path, a key that is neither an attribute nor in `others`, or something else for a mapping.
        """
        given = source if isinstance(source, Mapping) else {"path": source}
        own = [field.name for field in fields(cls)]
        check_keys(f"source {name!r}", given, (*own, *others))
        if not isinstance(given.get("path"), str):
            keys = ", ".join((*own[1:], *others))
            raise ConfigError(f"source {name!r} is {source!r}; expected a path, or a mapping with path (and {keys})")
        place = replace(default, **{key: value for key, value in given.items() if key in own})
        columns = place.column_mapping
        texts = isinstance(columns, Mapping) and all(isinstance(name, str) for name in columns.values())
        if columns is not None and not texts:
            raise ConfigError(f"column_mapping of source {name!r} is {columns!r}; expected their names and ours (JSON)")
        if not isinstance(place.streaming, bool):
            raise ConfigError(f"streaming of source {name!r} is {place.streaming!r}; expected true or false")
        if not files.is_hub_id(place.path) and (asked := [key for key in (*own[2:6], own[8]) if getattr(place, key)]):
            raise ConfigError(f"source {name!r}, {place.path}, is no dataset of the Hub; {asked[0]} is for those")
        return place

    @property
    def on_hub(self) -> bool:
        """Whether the rows are a dataset of the Hub."""
        return files.is_hub_id(self.path)

    def load_dataset(self) -> Any:
        """Load a dataset of the Hub, a Dataset or, with `streaming`, an IterableDataset, by the login of its client.

        Raises:
            ConfigError: no such dataset, subset or split (those that exist are named), or no connection.
        """
        with self.naming():
            return load_dataset(self.path, self.config, split=self.split, streaming=self.streaming, **self._files())

    def version(self) -> str:
        """A value that changes when a dataset of the Hub does: its cache folder, which is named by its files and revision."""
        with self.naming():
            return str(load_dataset_builder(self.path, self.config, **self._files()).cache_dir)

    def commit(self) -> str | None:
        """The commit that a dataset of the Hub is read from; where it cannot be asked for, the revision as it was given."""
        try:
            found = str(load_dataset_builder(self.path, self.config, **self._files()).hash)
        except _ERRORS:
            return self.revision
        return found if re.fullmatch("[0-9a-f]{40}", found) else self.revision

    def _files(self) -> dict[str, Any]:
        return {"revision": self.revision, "data_files": self.data_files, "data_dir": self.data_dir}

    @contextlib.contextmanager
    def naming(self) -> Iterator[None]:
        """Name the dataset in an error of what loads or streams it."""
        try:
            yield
        except _ERRORS as error:
            raise ConfigError(f"{self.path}: {self._reason(error)}") from error

    def _reason(self, error: Exception) -> str:
        said = " ".join(str(error).split())
        if "Config name is missing" in said or "BuilderConfig" in said:
            try:
                known = get_dataset_config_names(self.path, revision=self.revision)
            except Exception:  # no connection, for one: what was said first stands
                return said[:400]
            asked = "dataset_config is missing" if self.config is None else f"no subset {self.config!r}"
            return f"{asked}; expected one of {', '.join(known)}{nearest(str(self.config), known)}"
        if isinstance(error, ConnectionError):
            return f"the Hub cannot be reached ({said[:200]}); give a local file, or the dataset once with a connection"
        return said[:400]

    def renaming(self, known: Sequence[str]) -> Renaming | None:
        """How columns of these names are renamed and left out; None for not at all.

        Raises:
            ConfigError: a column that is to be renamed or kept is not there; names those that are.
        """
        if not self.column_mapping and not self.columns:
            return None
        new = dict(self.column_mapping or {})
        keep = list(dict.fromkeys([*self.columns, *new])) if self.columns else list(known)
        for column in dict.fromkeys([*new, *keep]):
            if column not in known:
                raise ConfigError(f"{self.path} has no column {column!r}; it has {', '.join(known)}")
        replaced = [name for name in new.values() if name in keep and name not in new]
        return Renaming(new, keep, replaced)

    def rename(self, rows: Any) -> Any:
        """Rows, a list or a Dataset, with their columns renamed; see `renaming`."""
        mapped = isinstance(rows, Dataset)
        known = rows.column_names if mapped else list(dict.fromkeys(key for row in rows for key in row))
        renaming = self.renaming(known)
        if renaming is None:
            return rows
        if mapped:
            return rows.select_columns(renaming.keep).remove_columns(renaming.replaced).rename_columns(renaming.new)
        return [renaming.of_row(row) for row in rows]


@dataclass(frozen=True)
class Renaming:
    """New names of columns by their old ones, the columns to keep, and those that a new name takes the place of."""

    new: Mapping[str, str]
    keep: Sequence[str]
    replaced: Sequence[str]

    def of_row(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A row with its columns renamed."""
        left = {key: value for key, value in row.items() if key in self.keep and key not in self.replaced}
        return {self.new.get(key, key): value for key, value in left.items()}


def local_files(name: str) -> list[str]:
    """The files of a path, as `files.list_files`; those of an object store are copied into the cache of `datasets` once.

    Raises:
        FileFormatError: there is no file.
        ConfigError: the package for an address is not installed, or the store refuses.
    """
    if "://" not in name:
        return files.list_files(name)
    cache, local = Path(config.HF_DATASETS_CACHE) / "object_stores", []
    try:
        store, _, found = fsspec.get_fs_token_paths(name, mode="rb", expand=True)
        for path in sorted(found):
            kept = (
                cache
                / sha256(f"{name.split('://')[0]} {path} {store.ukey(path)}".encode()).hexdigest()[:20]
                / Path(path).name
            )
            if not kept.exists():  # a new version of a file has another key
                kept.parent.mkdir(parents=True, exist_ok=True)
                draft = kept.with_name(f"{kept.name}.{os.getpid()}.draft")
                store.get_file(path, str(draft))
                draft.replace(kept)
            local.append(str(kept))
    except FileNotFoundError as error:
        raise FileFormatError(f"no such file: {name}") from error
    except (ImportError, ValueError, OSError) as error:
        words = " ".join(str(error).split())[:200]
        raise ConfigError(f"{name} cannot be read ({type(error).__name__}: {words})") from error
    if not local:
        raise FileFormatError(f"no such file: {name}")
    return [file for path in local for file in files.list_files(path)]
