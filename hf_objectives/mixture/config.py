"""What to mix and how: the configuration of a mixture, in Python or YAML."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from hf_objectives.errors import ConfigError, nearest
from hf_objectives.labels import FORMATS, EncodingConfig
from hf_objectives.mixture.feeds import UNITS
from hf_objectives.mixture.weights import PRESETS, Stage, WeightPlan, tempered
from hf_objectives.packing import check_packing

PACKINGS = ("within", "across")
_TOLD = 12  # sources in a line
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SourceConfig:
    """One source of a mixture.

    Attributes:
        name: its name, in rows, logs and metrics.
        weight: its share, relative to the others'; None on all sources for the sizes that they have.
        path: where it is: a folder from `hf-objectives prepare` (of several sources in it the one with this name), a
            file, folder or glob, a list of these, or a dataset's id on the Hub.
        dataset: instead of a path, a `datasets.Dataset` or `IterableDataset`, a list of rows, or any iterable that can be
            iterated again.
        data_files: instead of a path, files; with a path that is a Hub id, files of that dataset.
        split: split of a Hub dataset.
        format: what its rows must be ("text", "messages" ...); None for whatever they are.
        streaming: read a Hub dataset as a stream.
        max_epochs: passes after which it ends, and its share goes to the others in proportion.
        eval_split: split that is held out: of a Hub dataset, or "validation" of a prepared folder.
        eval_share: share of its rows that is held out.
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
        object.__setattr__(self, "name", str(self.name))
        if self.path is not None and not isinstance(self.path, (str, list, tuple)):
            raise ConfigError(f"source {self.name!r}: path is {self.path!r}; expected a path or a list of them")
        object.__setattr__(self, "eval_share", number(f"source {self.name!r}: eval_share", self.eval_share))
        for name in ("weight", "max_epochs"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, number(f"source {self.name!r}: {name}", getattr(self, name)))
        if self.weight is not None and not 0 <= self.weight < float("inf"):
            raise ConfigError(f"source {self.name!r}: weight is {self.weight}; expected a number, 0 or more")
        if self.max_epochs is not None and not self.max_epochs > 0:
            raise ConfigError(f"source {self.name!r}: max_epochs is {self.max_epochs}; expected more than 0")
        if (self.dataset is None) == (self.path is None and self.data_files is None):
            raise ConfigError(f"source {self.name!r}: give a path (or data_files) or a dataset, one of the two")
        if self.format is not None and self.format not in FORMATS:
            raise ConfigError(
                f"source {self.name!r}: format is {self.format!r}; expected one of {', '.join(FORMATS)}"
                f"{nearest(self.format, FORMATS)}"
            )
        if not 0 <= self.eval_share < 1:
            raise ConfigError(f"source {self.name!r}: eval_share is {self.eval_share}; expected 0 or more, under 1")
        if self.eval_share and self.eval_split:
            raise ConfigError(f"source {self.name!r}: give eval_share or eval_split, one of the two")


@dataclass(frozen=True)
class StageConfig:
    """Other weights from some point of the run on.

    Attributes:
        begin: units of the mixture (tokens, by default) after which weights change.
        weights: the weights, by source; a source that is not named gets none.
        end: where the change is complete, and weights move there in a straight line; None for a step.
    """

    begin: int
    weights: Mapping[str, float]
    end: int | None = None


@dataclass(frozen=True)
class MixtureConfig:
    """A mixture.

    Attributes:
        sources: the sources; or a mapping of names to mappings with the other keys, to paths, or to datasets.
        unit: what weights count: "tokens", "supervised" (trained tokens), "examples" or "rows" (packed ones).
        preset: weights of a published mixture, "gpt3" or "llama3", instead of `weight`.
        bind: which source stands for which part of the preset, by the name of the part; parts that are left out get no
            weight. Not needed where sources have the names of the parts.
        temperature: weights p become p^(1/T): above 1 they move towards equal ones.
        stages: weights that change as the run goes on.
        packing: "within" packs the documents of each source into rows, which are then mixed; "across" mixes documents and
            packs those of all sources together; None leaves rows as they are.
        max_length: most tokens of a row; needed where rows are packed.
        strategy, overflow: see `pack_dataset`.
        buffer_size: rows of a stream that are shuffled among themselves.
        blocklist: numbers of rows that are never drawn, by source; or a YAML or JSON file of that.
        train_on, control_tokens, overlength, expand_turns, chat_template, num_proc: how rows that are not encoded yet
            become tokens, see `prepare_dataset`.

    Raises:
        ConfigError: what cannot work; names the source.
    """

    sources: Sequence[SourceConfig]
    unit: str = "tokens"
    preset: str | None = None
    bind: Mapping[str, str] | None = None
    temperature: float = 1.0
    stages: Sequence[StageConfig] = ()
    packing: str | None = None
    max_length: int | None = None
    strategy: str = "best_fit"
    overflow: str = "split"
    buffer_size: int = 1000
    blocklist: Mapping[str, Sequence[int]] = field(default_factory=dict)
    train_on: str = "assistant"
    control_tokens: str = "plain"
    overlength: str = "drop"
    expand_turns: bool = False
    chat_template: str | None = None
    num_proc: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "sources", _sources(self.sources))
        object.__setattr__(
            self, "stages", [s if isinstance(s, StageConfig) else _read(StageConfig, s, "stage") for s in self.stages]
        )
        object.__setattr__(self, "temperature", number("temperature", self.temperature))
        object.__setattr__(self, "buffer_size", int(number("buffer_size", self.buffer_size)))
        if self.max_length is not None:
            object.__setattr__(self, "max_length", int(number("max_length", self.max_length)))
        if self.bind is not None and not isinstance(self.bind, Mapping):
            raise ConfigError(
                f"bind is {type(self.bind).__name__}; expected a mapping of parts of the preset to sources"
            )
        if isinstance(self.blocklist, str):
            object.__setattr__(self, "blocklist", _yaml(self.blocklist))
        _check_blocklist(self.blocklist)
        names = self.names
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"two sources are named {name!r}; expected a name each")
        for what, value, known in (
            ("unit", self.unit, UNITS),
            ("packing", self.packing, (None, *PACKINGS)),
            ("preset", self.preset, (None, *PRESETS)),
        ):
            if value not in known:
                words = [str(word) for word in known if word]
                raise ConfigError(
                    f"{what} is {value!r}; expected one of {', '.join(words)}{nearest(str(value), words)}"
                )
        if self.packing and self.max_length is None:
            raise ConfigError("packing needs max_length, the number of tokens a packed row holds")
        if self.packing:
            check_packing(self.max_length or 0, self.strategy, self.overflow)
        if self.packing == "across" and self.unit == "rows":
            raise ConfigError(
                "unit 'rows' with packing across sources, where rows are of several; expected tokens or examples"
            )
        if self.buffer_size < 1:
            raise ConfigError(f"buffer_size is {self.buffer_size}; expected at least 1 row")
        for where, given in (
            ("blocklist", self.blocklist),
            *((f"stage {i}", s.weights) for i, s in enumerate(self.stages)),
        ):
            for name in given:
                if name not in names:
                    raise ConfigError(
                        f"{where} names source {name!r}; expected one of {', '.join(names)}{nearest(str(name), names)}"
                    )

    @property
    def names(self) -> list[str]:
        """Names of the sources."""
        return [source.name for source in self.sources]

    def row_settings(self) -> EncodingConfig:
        """What rows are encoded under."""
        return EncodingConfig(
            max_length=self.max_length,
            train_on=self.train_on,
            control_tokens=self.control_tokens,
            overlength=self.overlength,
            expand_turns=self.expand_turns,
            chat_template=self.chat_template,
            splits_documents=self.packing is not None,
        )

    @classmethod
    def read(cls, given: MixtureConfig | Mapping[str, Any] | str | Path) -> MixtureConfig:
        """A configuration from a mapping with the same keys, or a YAML file of one.

        Raises:
            ConfigError: an unknown key, or a file that cannot be read.
        """
        if isinstance(given, MixtureConfig):
            return given
        if isinstance(given, (str, Path)):
            return _read(cls, _yaml(given), str(given))
        return _read(cls, given, "mixture")

    def plan(self, sizes: Sequence[int | None]) -> tuple[WeightPlan, list[str]]:
        """The weights over the run, and what there is to say about them.

        Args:
            sizes: of each source, what a pass counts in the unit, where known; the weights where none are given.

        Raises:
            ConfigError: weights that mean nothing, or are given for some sources only.
        """
        notes: list[str] = []
        weights = self._preset_weights(notes) if self.preset else self._given_weights(sizes, notes)
        total = float(weights.sum())
        if not total:
            raise ConfigError(f"the weights of {', '.join(self.names)} are all 0; expected one above 0")
        if abs(total - 1) > 1e-9 and any(source.weight is not None for source in self.sources) | bool(self.preset):
            notes.append(f"weights add to {total:g}, normalised: {_shares(self.names, weights / total)}")
        if self.temperature != 1:
            weights = tempered(weights, self.temperature)
            notes.append(f"at temperature {self.temperature:g}: {_shares(self.names, weights)}")
        stages = [_stage(i, stage, self.names) for i, stage in enumerate(self.stages)]
        return WeightPlan(weights, stages), notes

    def _given_weights(self, sizes: Sequence[int | None], notes: list[str]) -> np.ndarray:
        given = [source.weight for source in self.sources]
        if all(weight is None for weight in given):
            for name, size in zip(self.names, sizes, strict=True):
                if size is None:
                    raise ConfigError(f"source {name!r} is a stream of unknown size; give every source a weight")
            notes.append(f"no weights given: each source by its {self.unit}")
            return np.array(sizes, float)
        for name, weight in zip(self.names, given, strict=True):
            if weight is None:
                raise ConfigError(f"source {name!r} has no weight, and others do; give every source one, or none")
        return np.array(given, float)

    def _preset_weights(self, notes: list[str]) -> np.ndarray:
        assert self.preset is not None
        parts = PRESETS[self.preset]
        bind = dict(self.bind) if self.bind is not None else {name: name for name in self.names}
        for source in self.sources:
            if source.weight is not None:
                raise ConfigError(
                    f"source {source.name!r} has a weight, and preset {self.preset!r} gives one; expected one of them"
                )
        for part, name in bind.items():
            if part not in parts:
                raise ConfigError(
                    f"preset {self.preset!r} has no part {part!r}; expected one of {', '.join(parts)}{nearest(part, parts)}"
                )
            if name not in self.names:
                raise ConfigError(
                    f"bind gives part {part!r} to source {name!r}; expected one of {', '.join(self.names)}"
                    f"{nearest(str(name), self.names)}"
                )
        weights = np.zeros(len(self.names))
        for part, name in bind.items():
            weights[self.names.index(name)] += parts[part]
        for name, weight in zip(self.names, weights, strict=True):
            if not weight:
                raise ConfigError(
                    f"source {name!r} stands for no part of preset {self.preset!r}; bind it to one, or take it out"
                )
        if left := [part for part in parts if part not in bind]:
            notes.append(f"preset {self.preset}: no source for {', '.join(left)}, whose share goes to the others")
        return weights


def _sources(given: Any) -> list[SourceConfig]:
    if isinstance(given, str) or not hasattr(given, "__iter__"):
        raise ConfigError(f"sources is {given!r}; expected a mapping of names to sources, or a list of them")
    if isinstance(given, Mapping):
        made = []
        for name, about in given.items():
            if isinstance(about, Mapping) and not hasattr(about, "features"):
                made.append(_read(SourceConfig, {"name": name, **about}, f"source {name!r}"))
            elif isinstance(about, SourceConfig):
                made.append(about)
            elif isinstance(about, (str, Path)) or (
                isinstance(about, list) and all(isinstance(p, str) for p in about) and about
            ):
                made.append(SourceConfig(str(name), path=about if isinstance(about, list) else str(about)))
            else:
                made.append(SourceConfig(str(name), dataset=about))
    else:
        made = [
            one if isinstance(one, SourceConfig) else _read(SourceConfig, one, f"source {i}")
            for i, one in enumerate(given)
        ]
    if not made:
        raise ConfigError("no sources; name at least one")
    return made


def _yaml(path: str | Path) -> Any:
    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error


def _check_blocklist(given: Any) -> None:
    if not isinstance(given, Mapping):
        raise ConfigError(f"the blocklist is {type(given).__name__}; expected a mapping of source names to row numbers")
    for name, rows in given.items():
        wrong = (
            [row for row in rows if not isinstance(row, int) or row < 0]
            if isinstance(rows, list | tuple | set)
            else rows
        )
        if wrong or not isinstance(rows, list | tuple | set):
            raise ConfigError(
                f"the blocklist of source {name!r} has {wrong!r}; expected a list of row numbers, from 0 on"
            )


def _read(kind: type, given: Any, where: str) -> Any:
    known = [f.name for f in fields(kind)]
    if not isinstance(given, Mapping):
        raise ConfigError(f"{where} is {type(given).__name__}; expected a mapping with {', '.join(known)}")
    for key in given:
        if key not in known:
            raise ConfigError(f"{where}: unknown key {key!r}{nearest(str(key), known)}")
    try:
        return kind(**given)
    except TypeError as error:
        raise ConfigError(f"{where}: {str(error).split('__init__() ')[-1]}") from error


def _shares(names: Sequence[str], shares: np.ndarray) -> str:
    told = [f"{name} {share:.2%}" for name, share in zip(names[:_TOLD], shares[:_TOLD], strict=True)]
    return ", ".join(told) + (f" and {len(names) - _TOLD:,} more" if len(names) > _TOLD else "")


def _stage(at: int, stage: StageConfig, names: Sequence[str]) -> Stage:
    begin = int(number(f"stage {at}: begin", stage.begin))
    end = begin if stage.end is None else int(number(f"stage {at}: end", stage.end))
    weights = np.array([number(f"stage {at}: weight of {name!r}", stage.weights.get(name, 0)) for name in names])
    wrong = [(n, w) for n, w in zip(names, weights, strict=True) if not 0 <= w < float("inf")]
    if wrong or not weights.any() or begin < 0:
        found = (
            f"weight {wrong[0][1]} for source {wrong[0][0]!r}"
            if wrong
            else f"begin {begin} and weights {dict(stage.weights)}"
        )
        raise ConfigError(f"stage {at} has {found}; expected weights of 0 or more, one above, and a begin of 0 or more")
    return Stage(begin, weights / weights.sum(), end)


def number(what: str, value: Any) -> float:
    """A setting as a number; YAML reads 1e9 as a string.

    Raises:
        ConfigError: it is none, or NaN.
    """
    try:
        read = float(value)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{what} is {value!r}; expected a number") from error
    if read != read or read in (float("inf"), float("-inf")):
        raise ConfigError(f"{what} is {'NaN' if read != read else value}; expected a number")
    return read
