"""The table of the recipes' options is what their dataclasses are."""

from __future__ import annotations

import json
from pathlib import Path

from hf_objectives.cli import recipe_options
from hf_objectives.cli.option_table import RECIPES, live_table
from hf_objectives.cli.recipe_options import TABLE, installed_table, read_table, recipe_keys
from hf_objectives.recipes.dpo import Dpo

ROOT = Path(__file__).parents[2]


def test_the_table_is_that_of_the_live_dataclasses():
    assert installed_table() == live_table(), "run: python -m hf_objectives.cli.option_table"


def test_the_file_is_of_the_releases_that_are_tested():
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    versions = json.loads(TABLE.read_text())["versions"]
    assert versions == {name: pinned[name] for name in versions}, "run: python -m hf_objectives.cli.option_table"


def test_under_another_release_the_options_are_those_of_its_dataclasses(tmp_path, monkeypatch):
    """Help is that of the package and says so; what decides which options there are is made anew, once."""
    classes = {name: {**entry, "options": {}} for name, entry in read_table()["classes"].items()}
    old = {**read_table(), "versions": {"transformers": "5.0.0", "trl": "1.0.0"}, "classes": classes}
    (tmp_path / "table.json").write_text(json.dumps(old))
    monkeypatch.setattr(recipe_options, "TABLE", tmp_path / "table.json")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    caches = recipe_options.read_table, recipe_options.installed_table
    for cached in caches:
        cached.cache_clear()
    try:
        said = " ".join(recipe_options.make_recipe_parser("dpo").format_help().split())
        assert "These are the options under transformers 5.0.0 and trl 1.0.0; under transformers" in said
        assert "beta" in recipe_keys("dpo") and recipe_options.installed_table() == live_table()
        (kept,) = (tmp_path / "hf_objectives").iterdir()
        kept.write_text(json.dumps({**live_table(), "recipes": {}}))
        recipe_options.installed_table.cache_clear()
        assert recipe_options.installed_table()["recipes"] == {}  # it is not made again
        kept.write_text("{")
        recipe_options.installed_table.cache_clear()
        assert recipe_options.installed_table() == live_table()
    finally:
        for cached in caches:
            cached.cache_clear()


def test_every_option_of_a_recipe_is_in_it():
    assert {*read_table()["recipes"]} == {*RECIPES}
    fields = {f.name for cls in Dpo.arguments for f in cls.__dataclass_fields__.values() if f.init}
    assert recipe_keys("dpo") == fields
