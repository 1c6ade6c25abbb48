"""All stages of the objective stack; the program is `hf_objectives/recipes/stack.py`."""

from hf_objectives.recipes import run_program
from hf_objectives.recipes.stack import main

if __name__ == "__main__":
    run_program(main)
