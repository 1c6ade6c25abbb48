"""What to mix and how: the configuration of a mixture, in Python or YAML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields
from math import isfinite
from pathlib import Path
from typing import Any

from hf_objectives.errors import ConfigError
from hf_objectives.labels import FORMATS, EncodingConfig
from hf_objectives.packing import check_packing
from hf_objectives.preparation import check_share
from hf_objectives.types import check_keys, check_one_of, parse_yaml

#: What weights count.
UNITS = ("tokens", "supervised", "examples", "rows")
PACKINGS = ("within", "across")
PRESETS = {
    # GPT-3's (Brown et al., arXiv 2005.14165, table 2.2) as commonly rounded; it adds to 1.04.
    "gpt3": {"common_crawl": 0.60, "books": 0.16, "wikipedia": 0.03, "github": 0.03, "webtext": 0.22},
    # An approximation of Llama 3's.
    "llama3": {"web": 0.82, "code": 0.08, "math": 0.04, "books": 0.03, "other": 0.03},
}


@dataclass
class SourceConfig:
    """One source of a mixture.

    Attributes:
        name: its name, in rows, logs and metrics.
        weight: its share, relative to the others'; None on all sources for the sizes that they have.
        path: a folder from `hf-objectives prepare` (if it has several sources, the one with this name), a file, folder or
            glob, a list of these, or a dataset's id on the Hub.
        dataset: instead of a path, a `datasets.Dataset` or `IterableDataset`, a list of rows, or any iterable that can be
            iterated again.
        data_files: instead of a path, files; with a path that is a Hub id, files of that dataset.
        split: split of a Hub dataset.
        format: the expected format of its rows ("text", "messages" ...); None for any.
        streaming: read a Hub dataset as a stream.
        max_epochs: epochs after which it ends, and its share goes to the others in proportion.
        eval_split: split that is held out: of a Hub dataset, or "validation" of a prepared folder.
        eval_share: share of its rows that is held out, see `hold_out`.
    """

    name: str
    weight: float | None = None
    path: str | Sequence[str] | None = None
    dataset: Any = None
    data_files: str | Sequence[str] | None = None
    split: str = "train"
    format: str | None = None
    streaming: bool = False
    max_epochs: float | None = None
    eval_split: str | None = None
    eval_share: float = 0.0

    def __post_init__(self) -> None:
        self.name = str(self.name)
        where = f"source {self.name!r}"
        if self.path is not None and not isinstance(self.path, (str, list, tuple)):
            raise ConfigError(f"{where}: path is {self.path!r}; expected a path or a list of them")
        for name in ("weight", "max_epochs", "eval_share"):
            if getattr(self, name) is not None:
                setattr(self, name, number(f"{where}: {name}", getattr(self, name)))
        if self.weight is not None and self.weight < 0:
            raise ConfigError(f"{where}: weight is {self.weight}; expected a number, 0 or more")
        if self.max_epochs is not None and self.max_epochs <= 0:
            raise ConfigError(f"{where}: max_epochs is {self.max_epochs}; expected more than 0")
        if (self.dataset is None) == (self.path is None and self.data_files is None):
            raise ConfigError(f"{where}: give a path (or data_files) or a dataset, one of the two")
        check_one_of(f"{where}: format", self.format, (None, *FORMATS))
        check_share(f"{where}: eval_share", self.eval_share)
        if self.eval_share and self.eval_split:
            raise ConfigError(f"{where}: give eval_share or eval_split, one of the two")


@dataclass
class StageConfig:
    """Other weights, by source, from some point of the run on; a source that is not named gets none.

    `begin` is the units of the mixture (tokens, by default) after which the weights change. They move in a straight line
    until `end`, or in a step without one.
    """

    begin: int
    weights: Mapping[str, float]
    end: int | None = None


@dataclass
class MixtureConfig(EncodingConfig):
    """A mixture. Rows that are not encoded yet become tokens under the options of `EncodingConfig`.

    Attributes:
        sources: the sources; or a mapping of names to mappings with the other keys, to paths, or to datasets.
        unit: what weights count: "tokens", "supervised" (trained tokens), "examples" or "rows" (packed ones).
        preset: weights of a published mixture, "gpt3" or "llama3", instead of `weight`.
        bind: the source for each part of the preset, by the name of the part; parts that are left out get no weight. Not
            needed where sources have the names of the parts.
        temperature: weights p become p^(1/T): above 1 they move towards equal ones.
        stages: weights that change as the run goes on.
        packing: "within" packs the documents of each source into rows, which are then mixed; "across" mixes documents and
            packs those of all sources together; None leaves rows as they are.
        max_length: most tokens of a row; needed where rows are packed.
        strategy, overflow: see `pack_dataset`.
        buffer_size: rows of a stream that are shuffled among themselves.
        blocklist: numbers of rows that are never drawn, by source; or a YAML or JSON file of that.
        num_proc: worker processes that encode rows.

    Raises:
        ConfigError: a setting cannot work; names the source.
    """

    sources: Sequence[SourceConfig]
    unit: str = "tokens"
    preset: str | None = None
    bind: Mapping[str, str] | None = None
    temperature: float = 1.0
    stages: Sequence[StageConfig] = ()
    packing: str | None = None
    _: KW_ONLY
    strategy: str = "best_fit"
    overflow: str = "split"
    buffer_size: int = 1000
    blocklist: Mapping[str, Sequence[int]] = field(default_factory=dict)
    num_proc: int | None = None
    splits_documents: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.sources = _read_sources(self.sources)
        self.stages = [_read(StageConfig, stage, "stage") for stage in self.stages]
        self.temperature = number("temperature", self.temperature)
        self.buffer_size = int(number("buffer_size", self.buffer_size))
        if self.max_length is not None:
            self.max_length = int(number("max_length", self.max_length))
        if isinstance(self.blocklist, str):
            self.blocklist = _read_yaml(self.blocklist)
        super().__post_init__()
        check_one_of("unit", self.unit, UNITS)
        check_one_of("packing", self.packing, (None, *PACKINGS))
        check_one_of("preset", self.preset, (None, *PRESETS))
        self.splits_documents = self.packing is not None
        if self.packing:
            check_packing(self.max_length, self.strategy, self.overflow)
        if self.packing == "across" and self.unit == "rows":
            mixed = "unit 'rows' with packing across sources, whose rows mix sources"
            raise ConfigError(f"{mixed}; expected tokens or examples")
        if self.buffer_size < 1:
            raise ConfigError(f"buffer_size is {self.buffer_size}; expected at least 1 row")
        if self.bind is not None and not isinstance(self.bind, Mapping):
            found = type(self.bind).__name__
            raise ConfigError(f"bind is {found}; expected a mapping of parts of the preset to sources")
        self._check_names()

    def _check_names(self) -> None:
        names = self.names
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ConfigError(f"two sources are named {twice!r}; expected a name each")
        if not isinstance(self.blocklist, Mapping):
            found = type(self.blocklist).__name__
            raise ConfigError(f"the blocklist is {found}; expected a mapping of source names to row numbers")
        check_keys("the sources of the blocklist", self.blocklist, names)
        for i, stage in enumerate(self.stages):
            check_keys(f"the sources of stage {i}", stage.weights, names)
        for name, rows in self.blocklist.items():
            listed = isinstance(rows, list | tuple | set)
            wrong = [row for row in rows if not isinstance(row, int) or row < 0] if listed else rows
            if wrong or not listed:
                raise ConfigError(
                    f"the blocklist of source {name!r} has {wrong!r}; expected a list of row numbers, from 0 on"
                )

    @property
    def names(self) -> list[str]:
        """Names of the sources."""
        return [source.name for source in self.sources]

    @property
    def packed_by(self) -> dict[str, Any]:
        """The arguments of `pack_dataset`."""
        return {"max_length": self.max_length or 0, "strategy": self.strategy, "overflow": self.overflow}

    @classmethod
    def read(cls, config: MixtureConfig | Mapping[str, Any] | str | Path) -> MixtureConfig:
        """Read a configuration from a mapping with the same keys, or from a YAML file of one.

        Raises:
            ConfigError: a key is unknown, or the file cannot be read.
        """
        if isinstance(config, (str, Path)):
            return _read(cls, _read_yaml(config), str(config))
        return _read(cls, config, "mixture")


def _read_sources(entries: Any) -> list[SourceConfig]:
    if isinstance(entries, str) or not hasattr(entries, "__iter__"):
        raise ConfigError(f"sources is {entries!r}; expected a mapping of names to sources, or a list of them")
    if not entries:
        raise ConfigError("no sources; name at least one")
    if isinstance(entries, Mapping):
        return [_read_source(name, entry) for name, entry in entries.items()]
    return [_read(SourceConfig, entry, f"source {i}") for i, entry in enumerate(entries)]


def _read_source(name: Any, entry: Any) -> SourceConfig:
    if isinstance(entry, SourceConfig):
        return entry
    if isinstance(entry, Mapping) and not hasattr(entry, "features"):  # no DatasetDict
        return _read(SourceConfig, {"name": name, **entry}, f"source {name!r}")
    if isinstance(entry, (str, Path)):
        return SourceConfig(name, path=str(entry))
    if isinstance(entry, list) and entry and all(isinstance(path, str) for path in entry):
        return SourceConfig(name, path=entry)
    return SourceConfig(name, dataset=entry)


def _read(kind: type, values: Any, where: str) -> Any:
    if isinstance(values, kind):
        return values
    known = [option.name for option in fields(kind) if option.init]
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where} is {type(values).__name__}; expected a mapping with {', '.join(known)}")
    check_keys(where, values, known)
    try:
        return kind(**values)
    except TypeError as error:  # a key is missing
        raise ConfigError(f"{where}: {str(error).split('__init__() ')[-1]}") from error


def _read_yaml(path: str | Path) -> Any:
    try:
        return parse_yaml(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error


def number(name: str, value: Any) -> float:
    """Read a setting as a finite number, YAML reads 1e9 as a string; a ConfigError where it is none."""
    try:
        read = float(value)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name} is {value!r}; expected a number") from error
    if not isfinite(read):
        raise ConfigError(f"{name} is {'NaN' if read != read else value}; expected a number")
    return read
