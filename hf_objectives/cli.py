"""`hf-objectives`: the command line.

hf-objectives prepare --config corpus.yaml [--option value ...]
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from transformers import AutoTokenizer

from hf_objectives.cli_args import named_sources, parse_config, read_template
from hf_objectives.corpus.build import prepare_corpus
from hf_objectives.corpus.config import CorpusSettings
from hf_objectives.errors import ConfigError, HFObjectivesError, nearest


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


#: The commands, by name.
COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {"prepare": prepare}


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; an error of ours, or of the file system, is a line on stderr and exit code 1."""
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
        COMMANDS[words[0]](words[1:])
    except (HFObjectivesError, OSError) as error:  # a tokenizer that is not found, a folder that cannot be made
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
