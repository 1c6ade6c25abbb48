"""The recipes: programs that train, and what they share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_objectives import import_on_use

if TYPE_CHECKING:
    from hf_objectives.recipes.arguments import (
        BUILT_IN,  # The name that stands for the built-in model, tokenizer and data
        LAUNCHED,  # The environment variable that names the YAML keys of a launch
        EncodingArguments,  # The options under which rows are encoded, as options of a program
        named_sources,  # Read the sources by name from `sources` (JSON) or `dataset_name`
        parse_config,  # Parse a YAML file and the command line over it into dataclasses
        read_template,  # Read a chat template from the .jinja file that is named, or take the text itself
    )
    from hf_objectives.recipes.built_in import (
        built_in_rows,  # Make rows of the built-in corpus by its name
        is_built_in,  # Whether a path is a name of the built-in corpus
    )
    from hf_objectives.recipes.config_files import (
        CONFIGS,  # The folder of the shipped configs
        LAUNCH_CONFIGS,  # The folder of the shipped configs of accelerate launch
        ConfigFile,  # A YAML file of options, with the line of each key
        find_config,  # Find a YAML file by its path, or a shipped one by its name
    )
    from hf_objectives.recipes.hub_arguments import (
        HubArguments,  # Which part of a dataset of the Hub, as options
        StreamedHubArguments,  # The same, with streams
    )
    from hf_objectives.recipes.models import (
        load_tokenizer,  # Load the built-in tokenizer, or that of a folder or a Hub id
    )
    from hf_objectives.recipes.other_tools import (
        convert_config,  # A config of axolotl or LLaMA-Factory as ours
    )
    from hf_objectives.recipes.preview import (
        mixture_table,  # Show what each source of a mixture was to give and gave
        print_example,  # Print the name and the beginning of a row
    )
    from hf_objectives.recipes.run import (
        run_program,  # Run a recipe as a program: our errors as one line
    )
    from hf_objectives.recipes.step_rows import (
        rows_of_step,  # Find the rows that a step of a run was trained on
    )
    from hf_objectives.recipes.verification import (
        Check,  # One thing of a published model that was checked
        verify,  # Measure the figures of a published model again
    )
else:
    __getattr__, __dir__ = import_on_use(__name__, __file__)
