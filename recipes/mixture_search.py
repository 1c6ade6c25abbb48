"""The search for mixture weights; the program is `hf_objectives/recipes/mixture_search.py`."""

from hf_objectives.recipes import run_program
from hf_objectives.recipes.mixture_search import main

if __name__ == "__main__":
    run_program(main)
