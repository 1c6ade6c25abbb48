"""The recipes: programs that train, and what they share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_objectives import import_on_use

if TYPE_CHECKING:
    from hf_objectives.recipes.arguments import (
        BUILT_IN,  # The name that stands for the built-in model, tokenizer and data
        EncodingArguments,  # The options under which rows are encoded, as options of a program
        named_sources,  # Read the sources by name from `sources` (JSON) or `dataset_name`
        option,  # Declare an option of a program: its default and its help
        parse_config,  # Parse a YAML file and the command line over it into dataclasses
        read_template,  # Read a chat template from the .jinja file that is named, or take the text itself
    )
    from hf_objectives.recipes.models import (
        load_tokenizer,  # Load the built-in tokenizer, or that of a folder or a Hub id
    )
    from hf_objectives.recipes.preview import (
        highlight,  # Show the text of a row with its trained tokens on green
    )
    from hf_objectives.recipes.run import (
        run_program,  # Run a recipe as a program: our errors as one line
    )
    from hf_objectives.recipes.tables import (
        mixture_table,  # Show what each source of a mixture was to give and gave
    )
else:
    __getattr__, __dir__ = import_on_use(__name__, __file__)
