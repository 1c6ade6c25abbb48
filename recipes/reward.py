"""A reward model; the program is `hf_objectives/recipes/reward.py`."""

from hf_objectives.recipes import run_program
from hf_objectives.recipes.reward import main

if __name__ == "__main__":
    run_program(main)
