"""`hf-objectives convert`: a config of another tool as ours."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import yaml

from hf_objectives.cli.options import ConvertOptions
from hf_objectives.cli.recipe_options import recipe_keys
from hf_objectives.errors import ConfigError
from hf_objectives.recipes import ConfigFile, convert_config


def convert(options: ConvertOptions) -> None:
    """Print our YAML, or write it; what has no match goes to stderr, a line for each key."""
    file = ConfigFile.read(Path(options.file))
    done = convert_config(file.values, recipe_keys)
    if done is None:
        raise ConfigError(
            f"{options.file} is neither a config of axolotl nor of LLaMA-Factory; one of TRL's runs as it is: "
            f"hf-objectives sft --config {options.file}"
        )
    if options.json:
        print(json.dumps(asdict(done), indent=1, ensure_ascii=False))
        return
    text = yaml.safe_dump(done.values, sort_keys=False, allow_unicode=True)
    command = f"# {done.tool}, as hf-objectives {done.recipe} --config {options.output or 'FILE'} takes it\n"
    if options.output:
        Path(options.output).write_text(command + text, encoding="utf-8")
    else:
        print(command + text, end="")
    for key, why in done.rest.items():
        place = f"{file.path}, line {file.lines[key]}" if key in file.lines else str(file.path)
        print(f"{place}: {key}: {why}", file=sys.stderr)
