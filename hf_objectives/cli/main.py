"""`hf-objectives`: the command line.

hf-objectives inspect --dataset_name chats.jsonl --tokenizer folder [--html labels.html]
hf-objectives prepare --config corpus.yaml [--option value ...]
hf-objectives mixture --mixture mixture.yaml [--tokens 1000000000] [--plot mixture.png]
hf-objectives mixture --run runs/base [--plot mixture.png]
hf-objectives diagnose runs/base [more runs ...] [--json] [--fail_on warning]
hf-objectives plot runs/base [more runs ...] [--output training_curves.png]
hf-objectives report runs/base [--output report.html] [--compare runs/other]
hf-objectives replay runs/base/diagnostics/step_120_rank_0 [--model folder]
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from rich.console import Console
from transformers import AutoTokenizer

from hf_objectives.cli.diagnose import diagnose
from hf_objectives.cli.inspect import inspect
from hf_objectives.cli.plot import plot
from hf_objectives.cli.replay import replay
from hf_objectives.cli.report import report
from hf_objectives.diagnostics import plot_mixture, read_curves, report_of_log
from hf_objectives.errors import ConfigError, HFObjectivesError, nearest
from hf_objectives.mixture import build_mixture
from hf_objectives.preparation import CorpusSettings, prepare_corpus
from hf_objectives.recipes import mixture_table, named_sources, parse_config, read_template


@dataclass
class PrepareArguments(CorpusSettings):
    """What `hf-objectives prepare` takes: the settings of a corpus, its sources, its tokenizer and its folder."""

    sources: str | None = field(default=None, metadata={"help": "A mapping of names to paths or mappings (JSON)."})
    dataset_name: str | None = field(default=None, metadata={"help": "One source: a path, a glob or a Hub id."})
    tokenizer: str | None = field(default=None, metadata={"help": "Hub id or folder of the tokenizer."})
    output_dir: str | None = field(default=None, metadata={"help": "Folder of the shards."})
    overwrite: bool = field(default=False, metadata={"help": "Replace a folder made under other settings."})

    def __post_init__(self) -> None:
        for name in ("tokenizer", "output_dir"):
            if not getattr(self, name):
                raise ConfigError(f"{name} is missing")
        self.chat_template = read_template(self.chat_template)
        super().__post_init__()

    def named_sources(self) -> Mapping[str, Any]:
        """The sources by name.

        Raises:
            ConfigError: none, or both ways of naming them, or not a mapping.
        """
        return named_sources(self.sources, self.dataset_name)


def prepare(argv: Sequence[str]) -> None:
    """Prepare packed rows in a folder and say what became of every token."""
    (given,), _ = parse_config((PrepareArguments,), argv)
    tokenizer = AutoTokenizer.from_pretrained(given.tokenizer)
    settings = CorpusSettings(**{f.name: getattr(given, f.name) for f in fields(CorpusSettings)})
    manifest = prepare_corpus(given.named_sources(), tokenizer, given.output_dir, settings, overwrite=given.overwrite)
    print("\n".join(manifest.lines()))
    print(
        f"load_prepared({given.output_dir!r}) or load_dataset({settings.file_format!r}, data_dir={given.output_dir!r})"
    )


@dataclass
class MixtureArguments:
    """What `hf-objectives mixture` takes: a mixture to look ahead at, or a run to look back on."""

    mixture: str | None = field(default=None, metadata={"help": "YAML file of a mixture."})
    run: str | None = field(default=None, metadata={"help": "Output folder of a run on a mixture."})
    tokenizer: str | None = field(default=None, metadata={"help": "Hub id or folder; encodes raw rows."})
    tokens: float | None = field(default=None, metadata={"help": "How far to look, in tokens."})
    rows: int = field(default=10_000, metadata={"help": "How far to look, in rows."})
    seed: int = field(default=0, metadata={"help": "Of the order."})
    plot: str | None = field(default=None, metadata={"help": "A picture of the shares (png, svg, pdf)."})

    def __post_init__(self) -> None:
        if (self.mixture is None) == (self.run is None):
            raise ConfigError("give mixture or run, one of the two")
        if self.rows < 1 or (self.tokens is not None and self.tokens < 1):
            raise ConfigError(f"rows is {self.rows} and tokens {self.tokens}; expected at least 1")


def mixture(argv: Sequence[str]) -> None:
    """Say what a mixture will give, or has given, and draw it."""
    (given,), _ = parse_config((MixtureArguments,), argv)
    console = Console(stderr=False)
    if given.run is not None:
        curves = read_curves(given.run)
        console.print(mixture_table(report_of_log(curves)))
        if given.plot:
            print(plot_mixture(curves, given.plot))
        return
    tokenizer = AutoTokenizer.from_pretrained(given.tokenizer) if given.tokenizer else None
    made = build_mixture(given.mixture, tokenizer=tokenizer, seed=given.seed)
    rows = given.rows
    if given.tokens is not None:
        some, tokens = made.first_rows()
        rows = math.ceil(given.tokens * some / tokens) if tokens else rows
    reports = [made.report(rows * i // _POINTS) for i in range(1, _POINTS + 1)]
    console.print(mixture_table(reports[-1]))
    for line in made.expect(reports[-1].row):
        console.print(line, highlight=False, markup=False)
    if given.plot:
        print(plot_mixture(reports, given.plot))


_POINTS = 60  # of a curve
#: The commands, by name.
COMMANDS: dict[str, Callable[[Sequence[str]], int | None]] = {
    "prepare": prepare,
    "mixture": mixture,
    "inspect": inspect,
    "diagnose": diagnose,
    "plot": plot,
    "replay": replay,
    "report": report,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; an error of ours, or of the file system, is a line on stderr and exit code 2."""
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(f"usage: hf-objectives {{{','.join(COMMANDS)}}} ...\n\n{(__doc__ or '').strip()}")
        return
    try:
        if words[0] not in COMMANDS:
            raise ConfigError(
                f"unknown command {words[0]!r}; expected one of {', '.join(COMMANDS)}{nearest(words[0], COMMANDS)}"
            )
        code = COMMANDS[words[0]](words[1:])
    except (HFObjectivesError, OSError) as error:  # a tokenizer that is not found, a folder that cannot be made
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        code = 2
    if code:
        sys.exit(code)


if __name__ == "__main__":
    main()
