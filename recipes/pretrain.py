"""Pretraining; the program is `hf_objectives/recipes/pretrain.py`."""

from hf_objectives.recipes import run_program
from hf_objectives.recipes.pretrain import main

if __name__ == "__main__":
    run_program(main)
