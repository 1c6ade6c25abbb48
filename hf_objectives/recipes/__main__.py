"""`python -m hf_objectives.recipes sft --config quickstart`: a recipe by its name, the program that a launcher starts."""

import sys
from importlib import import_module

from hf_objectives.recipes import run_program

if __name__ == "__main__":
    run_program(lambda: import_module(f"hf_objectives.recipes.{sys.argv[1]}").main(sys.argv[2:]))
