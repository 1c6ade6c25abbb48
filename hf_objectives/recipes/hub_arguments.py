"""Which part of a dataset of the Hub, as options. Nothing heavy is imported before a place is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hf_objectives.errors import ConfigError
from hf_objectives.recipes.arguments import FRACTION, MIXTURE_KEYS, read_mapping
from hf_objectives.types import option, parse_json

if TYPE_CHECKING:
    from hf_objectives.preparation import Place


@dataclass(kw_only=True)
class HubArguments:
    """Which part of a dataset of the Hub, and what its columns are here."""

    dataset_config: str | None = option(None, "Subset of a Hub dataset.")
    dataset_revision: str | None = option(None, "Branch, tag or commit of a Hub dataset.")
    dataset_split: str = option("train", "Split of a Hub dataset, or an expression: train[:10%%], train+test.")
    dataset_test_split: str | None = option(None, "Split of a Hub dataset that is held out, in place of eval_share.")
    data_files: str | None = option(None, "Files of a Hub dataset: a path or pattern there, or several (JSON).")
    data_dir: str | None = option(None, "Folder of a Hub dataset.")
    column_mapping: str | None = option(None, 'Our names of columns by theirs (JSON): {"question": "prompt"}.')

    def place(self, name: str, source: Any) -> Place:
        """The place of a source, see `Place.read`."""
        from hf_objectives.preparation import Place  # imports datasets, which help can do without
        from hf_objectives.recipes.built_in import is_built_in

        columns = None if self.column_mapping is None else read_mapping("column_mapping", self.column_mapping)
        files: Any = self.data_files
        if files is not None and files.lstrip().startswith(("[", "{")):
            try:
                files = parse_json(files)
            except ValueError as error:
                raise ConfigError(f"data_files is {files!r}, which is no JSON ({error})") from error
        own: dict[str, Any] = {"config": self.dataset_config, "revision": self.dataset_revision, "data_files": files}
        own |= {"data_dir": self.data_dir, "column_mapping": columns}
        path = source.get("path") if isinstance(source, Mapping) else source
        if is_built_in(str(path)) and (asked := [key for key, value in own.items() if value is not None]):
            raise ConfigError(f"{asked[0]} is for datasets of the Hub; {path} is made here")
        place = Place.read(name, source, Place("", self.dataset_split, **own), (*MIXTURE_KEYS, FRACTION))
        splits = {
            "dataset_test_split": self.dataset_test_split,
            "split": place.split if place.split != "train" else None,
        }
        if (is_built_in(place.path) or not place.on_hub) and (asked := [key for key, given in splits.items() if given]):
            raise ConfigError(f"{asked[0]} of source {name!r} is for datasets of the Hub; {place.path} has no splits")
        return place


@dataclass(kw_only=True)
class StreamedHubArguments(HubArguments):
    """The same for rows that are encoded to disk, which may come as a stream."""

    streaming: bool = option(False, "Read a Hub dataset once, as a stream, without a copy in the cache of datasets.")

    def place(self, name: str, source: Any) -> Place:
        """The place of a source; local files are read as a stream is, without a copy."""
        place = super().place(name, source)
        return replace(place, streaming=place.streaming or (self.streaming and place.on_hub))
