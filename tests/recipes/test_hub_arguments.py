"""Which part of a dataset of the Hub, as options."""

from __future__ import annotations

import json

from hf_objectives.preparation import Place
from hf_objectives.recipes.data_arguments import DataArguments


def test_the_options_of_the_hub_hold_for_every_source_that_is_there():
    sources = {"a": "org/one", "b": {"path": "org/two", "config": "short", "column_mapping": {"q": "text"}}}
    given = DataArguments(
        sources=json.dumps(sources), dataset_config="long", dataset_revision="v2", data_files='["a.json", "b.json"]'
    )
    shared = {"revision": "v2", "data_files": ["a.json", "b.json"]}
    assert given.places() == {
        "a": Place("org/one", config="long", **shared),
        "b": Place("org/two", config="short", column_mapping={"q": "text"}, **shared),
    }
