"""The table of the recipes' options is what their dataclasses are."""

from __future__ import annotations

from hf_objectives.cli.option_table import RECIPES, live_table
from hf_objectives.cli.recipe_options import read_table, recipe_keys
from hf_objectives.recipes.dpo import Dpo


def test_the_table_is_that_of_the_live_dataclasses():
    assert read_table() == live_table(), "run: python -m hf_objectives.cli.option_table"


def test_every_option_of_a_recipe_is_in_it():
    assert {*read_table()["recipes"]} == {*RECIPES}
    fields = {f.name for cls in Dpo.arguments for f in cls.__dataclass_fields__.values() if f.init}
    assert recipe_keys("dpo") == fields
