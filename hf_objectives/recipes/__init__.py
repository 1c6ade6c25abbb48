"""The recipes: programs that train, and what they share."""

from __future__ import annotations

from hf_objectives.recipes.arguments import (
    named_sources,  # Sources by name from `sources` (JSON) or the one `dataset_name`
    parse_config,  # Parse `--config file.yaml` and overrides into dataclasses, as transformers' own parser would
    read_template,  # A chat template, read where a .jinja file is named
)
from hf_objectives.recipes.preview import (
    highlight,  # The text of a row with its trained tokens on green and the context dim
    mixture_table,  # What each source of a mixture was to give and gave
)
from hf_objectives.recipes.run import run_program  # run a main: our errors as one line, the group left in order
