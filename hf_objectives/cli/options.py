"""The options of every command as dataclasses, and the parser that is made of them. Nothing heavy is imported here."""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hf_objectives.errors import ConfigError
from hf_objectives.preparation import CorpusSettings
from hf_objectives.recipes import EncodingArguments, HubArguments, named_sources, parse_config
from hf_objectives.types import check_one_of, option

SEVERITY_STYLES = {"info": "cyan", "warning": "yellow", "error": "bold red"}
_LOG = "output folder, trainer_state.json, JSON lines, CSV, TensorBoard or trackio"


@dataclass
class PrepareOptions(CorpusSettings):
    """Prepare packed rows in a folder."""

    sources: str | None = option(None, "A mapping of names to paths or mappings (JSON).")
    dataset_name: str | None = option(None, "One source: a path, a glob or a Hub id.")
    tokenizer: str | None = option(None, "Hub id or folder of the tokenizer.")
    output_dir: str | None = option(None, "Folder of the shards.")
    overwrite: bool = option(False, "Replace a folder made under other settings.")
    json: bool = option(False, "What happened to every token, as JSON.", flag=True)

    def __post_init__(self) -> None:
        for name in ("tokenizer", "output_dir"):
            if not getattr(self, name):
                raise ConfigError(f"{name} is missing")
        super().__post_init__()

    def named_sources(self) -> Mapping[str, Any]:
        """The sources by name."""
        return named_sources(self.sources, self.dataset_name)


@dataclass
class MixtureOptions:
    """Say what a mixture will give, or what it gave in a run."""

    mixture: str | None = option(None, "YAML file of a mixture.")
    run: str | None = option(None, "Output folder of a run on a mixture.")
    tokenizer: str | None = option(None, "Hub id or folder; encodes raw rows.")
    tokens: float | None = option(None, "How far to look, in tokens.")
    rows: int = option(10_000, "How far to look, in rows.")
    seed: int = option(0, "Of the order.")
    plot: str | None = option(None, "A picture of the shares (png, svg, pdf).")
    json: bool = option(False, "The shares as JSON.", flag=True)

    def __post_init__(self) -> None:
        if (self.mixture is None) == (self.run is None):
            raise ConfigError("give mixture or run, one of the two")
        if self.rows < 1 or (self.tokens is not None and self.tokens < 1):
            raise ConfigError(f"rows is {self.rows} and tokens {self.tokens}; expected at least 1")


@dataclass(kw_only=True)
class InspectOptions(HubArguments, EncodingArguments):
    """Show which tokens of a dataset are trained, and warn of what is wrong."""

    dataset_name: str | None = option(None, "A .json/.jsonl/.parquet/.txt file, a glob, a Hub id, or 'builtin'.")
    sources: str | None = option(None, "A mapping of names to paths (JSON).")
    tokenizer: str | None = option(None, "Hub id or folder, or 'builtin'.")
    max_length: int | None = option(1024, "Tokens of a row.")
    packing: bool = option(False, "Pack several documents into a row.")
    strategy: str = option("best_fit", "best_fit, first_fit or concat.")
    examples: int = option(5, "Rows to show in the terminal.")
    rows: int = option(1000, "Rows to look at in each source, spread evenly over it.")
    html: str | None = option(None, "A page to write, with every token.")
    json: bool = option(False, "Figures, ledger and warnings as JSON.", flag=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tokenizer:
            raise ConfigError("tokenizer is missing; give a Hub id, a folder, or 'builtin'")
        if self.rows < 1 or self.examples < 0:
            raise ConfigError(f"rows is {self.rows} and examples {self.examples}; expected at least 1 and 0")


@dataclass(kw_only=True)
class PerplexityOptions(HubArguments):
    """Measure the exact perplexity of texts under a model."""

    model: str | None = option(None, "Hub id or folder of the model.")
    dataset_name: str | None = option(None, "Rows with a text: a .json/.jsonl/.parquet/.txt file, a glob, or a Hub id.")
    sources: str | None = option(None, "A mapping of names to paths (JSON); each has figures of its own.")
    max_length: int | None = option(None, "Tokens of a window; by default as many as the model takes.")
    stride: int | None = option(None, "Tokens by which a window moves; without one documents are cut at max_length.")
    batch_tokens: int | None = option(None, "Tokens computed at a time.")
    dtype: str = option("float32", "Of the weights: figures of bfloat16 differ in the third digit.")
    json: bool = option(False, "The figures as JSON.", flag=True)

    def __post_init__(self) -> None:
        if not self.model:
            raise ConfigError("model is missing; give a Hub id or a folder")
        check_one_of("dtype", self.dtype, ("float32", "bfloat16", "float16", "auto"))


@dataclass
class DiagnoseOptions:
    """Say what is wrong with one or several runs."""

    log: list[str] = field(metadata={"help": _LOG})
    json: bool = option(False, "Findings and notes as JSON.", flag=True)
    fail_on: str | None = option(None, "Exit code 1 on a finding that is at least so bad.", choices=SEVERITY_STYLES)


@dataclass
class PlotOptions:
    """Draw the curves of one or several runs over each other."""

    run: list[str] = field(metadata={"help": _LOG})
    output: str = option("training_curves.png", "The picture: .png, .svg or .pdf.")
    no_findings: bool = option(False, "Mark nothing that looks wrong.", flag=True)


@dataclass
class ReplayOptions:
    """Compute a batch again that the live monitor wrote."""

    folder: str = field(metadata={"help": "diagnostics/step_<n>_rank_<r> of a run"})
    model: str | None = option(None, "Folder or Hub id; by default the weights of the step, or the checkpoint before.")
    json: bool = option(False, "The examples and their losses as JSON.", flag=True)


@dataclass
class ReportOptions:
    """Write a run as one HTML file."""

    run: str = field(metadata={"help": f"{_LOG}, or a checkpoint"})
    output: str = option("report.html", "The file to write.")
    compare: str | None = option(None, "Another run: its curves are overlaid, its settings compared.")


@dataclass
class RowsOptions:
    """Say which rows a step of a recipe's run was trained on."""

    run: str = field(metadata={"help": "output folder of a recipe, or one of its checkpoints"})
    step: int | None = option(None, "The step, from 1, as logs have it.")
    text: bool = option(False, "Print the rows' texts, trained parts in ⟦⟧.", flag=True)
    json: bool = option(False, "JSON, a line for each document.", flag=True)

    def __post_init__(self) -> None:
        if self.step is None:
            raise ConfigError("step is missing; say which one")


@dataclass
class PushOptions:
    """Upload the model of a run with its card and results, and nothing else that lies there."""

    folder: str = field(metadata={"help": "output folder of a recipe"})
    hub_model_id: str | None = option(None, "The repository; by default it is named after the folder.")
    private: bool | None = option(None, "Whether a new repository is private; by default its owner's settings say.")
    revision: str | None = option(None, "The branch; by default the main one.")
    json: bool = option(False, "The address and the files as JSON.", flag=True)


@dataclass
class VerifyOptions:
    """Measure the figures of a published model again, and say of each whether it holds."""

    model: str = field(metadata={"help": "folder of a run, or repository of the Hub"})
    revision: str | None = option(None, "Branch, tag or commit of a repository.")
    data_dir: str | None = option(None, "Where the local files lie that the run was evaluated on.")
    use_cpu: bool | None = option(None, "Measure on the CPU; by default as the run did.")
    trust_remote_code: bool = option(False, "Run code of the repository: only if you have read it.")
    json: bool = option(False, "The checks as JSON.", flag=True)


@dataclass
class ConvertOptions:
    """Write a config of axolotl or LLaMA-Factory as ours, and list what it has no match for."""

    file: str = field(metadata={"help": "their YAML; one of TRL's runs as it is"})
    output: str | None = option(None, "The YAML to write; by default it is printed.")
    json: bool = option(False, "Recipe, settings and the rest as JSON.", flag=True)


#: The module of each command, which has a function of its name, and its options.
COMMANDS: dict[str, tuple[str, type]] = {
    "prepare": ("data", PrepareOptions),
    "mixture": ("data", MixtureOptions),
    "inspect": ("inspect", InspectOptions),
    "perplexity": ("perplexity", PerplexityOptions),
    "diagnose": ("runs", DiagnoseOptions),
    "plot": ("runs", PlotOptions),
    "replay": ("runs", ReplayOptions),
    "report": ("runs", ReportOptions),
    "rows": ("data", RowsOptions),
    "convert": ("convert", ConvertOptions),
    "push": ("publishing", PushOptions),
    "verify": ("publishing", VerifyOptions),
}


def parse(command: str, argv: Sequence[str]) -> Any:
    """The options of a command, from its YAML file (`--config`) and its command line."""
    (options,), _ = parse_config((COMMANDS[command][1],), argv, parser=make_parser(command))
    return options


def make_parser(command: str) -> argparse.ArgumentParser:
    """A parser with an option for every field of the command's dataclass; a field without a default is positional."""
    options = COMMANDS[command][1]
    parser = argparse.ArgumentParser(
        f"hf-objectives {command}",
        description=options.__doc__,
        epilog="--config FILE reads options from a YAML file; those of the command line come before them.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    hints = typing.get_type_hints(options)
    for declared in (f for f in dataclasses.fields(options) if f.init):
        settings: dict[str, Any] = dict(declared.metadata)
        kinds = [kind for kind in typing.get_args(hints[declared.name]) if kind is not types.NoneType]
        kind = kinds[0] if kinds else hints[declared.name]
        several = typing.get_origin(hints[declared.name]) is list
        if settings.pop("flag", False):
            settings |= {"action": "store_true"}
        elif kind is bool:
            settings |= {"type": _boolean, "nargs": "?", "const": True, "default": declared.default}
        else:
            settings |= {"type": kind, **({"nargs": "+"} if several else {})}
        if declared.default is dataclasses.MISSING:
            parser.add_argument(declared.name, **settings)
        else:
            names = dict.fromkeys((f"--{declared.name}", f"--{declared.name.replace('_', '-')}"))
            parser.add_argument(*names, **{"default": declared.default, **settings})
    return parser


def _boolean(text: str) -> bool:
    known = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if text.lower() not in known:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return known[text.lower()]
