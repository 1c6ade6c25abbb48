"""Where the rows of a recipe come from, as options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_objectives.errors import ConfigError
from hf_objectives.evaluation import check_answers
from hf_objectives.labels import ON_ERROR
from hf_objectives.preparation import Place, check_share, load_rows
from hf_objectives.recipes.arguments import (
    BUILT_IN,
    FRACTION,
    MIXTURE_KEYS,
    EncodingArguments,
    named_sources,
    read_mapping,
)
from hf_objectives.recipes.built_in import is_built_in, watched_rows
from hf_objectives.recipes.harness import HarnessArguments
from hf_objectives.recipes.hub_arguments import StreamedHubArguments
from hf_objectives.types import check_one_of, option, parse_json, parse_yaml

MIXTURE_HELP = "Weights: a mixture's settings (JSON, or a YAML file) for the sources, or with sources of its own."
_ON_ERROR = "A row that cannot be used: raise its error, or skip and count it."


@dataclass(kw_only=True)
class DataArguments(HarnessArguments, StreamedHubArguments, EncodingArguments):
    """Where the rows of fine-tuning come from, and how they become tokens."""

    dataset_name: str | None = option(
        None, "Hub id, a .json/.jsonl/.parquet/.txt file, 'builtin', 'builtin:careless' or 'builtin:texts'."
    )
    built_in_rows: int = option(30_000, "Rows of a built-in source.")
    sources: str | None = option(None, "Names and paths, or mappings with path, split, weight and max_epochs (JSON).")
    mixture: str | None = option(None, MIXTURE_HELP)
    eval_share: float = option(0.1, "Share of each source that is held out.")
    max_length: int = option(1024, "Tokens of a row.")
    packing: bool = option(True, "Pack several documents into a row.")
    strategy: str = option("best_fit", "best_fit or concat.")
    num_proc: int | None = option(None, "Processes that prepare data.")
    on_error: str = option("raise", _ON_ERROR)
    eval_answers: int = option(0, "Held-out prompts to answer at each evaluation, with exact match; 0 for none.")
    eval_max_new_tokens: int = option(64, "Where such an answer is cut.")
    eos_token: str | None = option(
        None, "The tokenizer's EOS token, where it is to be another; turns end by the template."
    )
    pad_token: str | None = option(None, "The tokenizer's padding token, where it is to be another.")
    allow_no_stop: bool = option(False, "Train also where most of the assistant's turns end without a control token.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_of("on_error", self.on_error, ON_ERROR)
        check_share("eval_share", self.eval_share)
        self.places()
        self.fractions()
        check_answers(self.eval_answers, self.eval_max_new_tokens)
        self.mixture_settings()

    def named_sources(self) -> Mapping[str, Any]:
        """The sources by name, as they were given."""
        return named_sources(self.sources, self.dataset_name)

    def places(self) -> dict[str, Place]:
        """Where the rows of each source lie."""
        return {name: self.place(name, source) for name, source in self.named_sources().items()}

    def fractions(self) -> dict[str, float] | None:
        """The share of the rows that each source is to have, adding to 1; None where sources are taken whole.

        Raises:
            ConfigError: a share that is no number above 0, or sources of which some have one and some have none.
        """
        given = {n: s.get(FRACTION) for n, s in self.named_sources().items() if isinstance(s, Mapping)}
        if not any(share is not None for share in given.values()):
            return None
        for name in self.named_sources():
            share = given.get(name)
            if isinstance(share, bool) or not isinstance(share, (int, float)) or not share > 0:
                raise ConfigError(
                    f"fraction of source {name!r} is {share!r}; expected a number above 0 for every source"
                )
        total = sum(share or 0 for share in given.values())
        return {name: (share or 0) / total for name, share in given.items()}

    def mixture_settings(self) -> dict[str, Any] | None:
        """The settings of the mixture to train on; None where the rows are trained as they are."""
        return read_mixture(self.mixture, self.named_sources())


@dataclass(kw_only=True)
class RowArguments(HarnessArguments, StreamedHubArguments):
    """Where the rows of alignment come from."""

    dataset_name: str = option(BUILT_IN, "Rows: a Hub id, a file, or 'builtin'.")
    eval_share: float = option(0.1, "Share of the rows that is held out.")
    on_error: str = option("raise", _ON_ERROR)
    packing, overlength = False, "the prompt's beginning goes first"  # what the plan says

    def __post_init__(self) -> None:
        check_one_of("on_error", self.on_error, ON_ERROR)
        check_share("eval_share", self.eval_share)


@dataclass(kw_only=True)
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
