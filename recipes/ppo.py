"""PPO or RLOO; the program is `hf_objectives/recipes/ppo.py`."""

from hf_objectives.recipes import run_program
from hf_objectives.recipes.ppo import main

if __name__ == "__main__":
    run_program(main)
