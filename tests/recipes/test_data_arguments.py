"""Where the rows of a recipe come from, as options."""

from __future__ import annotations

import json

import pytest

from hf_objectives.errors import ConfigError
from hf_objectives.preparation import Place
from hf_objectives.recipes.data_arguments import DataArguments, WatchedArguments


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("[1]", "not a mapping"),
        ("{", "not a mapping"),
        ('{"poems": "builtin"}', "the built-in corpus has texts and chats"),
    ],
)
def test_bad_lm_datasets(given, message):
    with pytest.raises(ConfigError, match=message):
        WatchedArguments(lm_datasets=given).watched()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dataset_name": "x.json", "sources": "{}"}, "dataset_name or sources, one of the two"),
        ({"sources": "{"}, "sources is not a mapping"),
        ({"sources": "{}"}, "one of the two|an empty mapping"),
        ({"dataset_name": "x.json", "train_on": "user"}, "train_on is 'user'"),
        ({"sources": '{"a": {"path": "x.json", "slpit": "test"}}'}, "source 'a': unknown key 'slpit' .*'split'"),
        ({"dataset_name": "x.json", "dataset_config": "long"}, "x.json, is no dataset of the Hub; config is for those"),
        (
            {"dataset_name": "builtin", "dataset_config": "long"},
            "config is for datasets of the Hub; builtin is made here",
        ),
        (
            {"dataset_name": "x.json", "dataset_test_split": "test"},
            "dataset_test_split of source 'x' is for datasets",
        ),
        ({"dataset_name": "builtin", "dataset_test_split": "test"}, "dataset_test_split .* builtin has no splits"),
        (
            {"dataset_name": "x.json", "dataset_split": "train[:10%]"},
            "split of source 'x' is for datasets of the Hub; x.json",
        ),
        ({"dataset_name": "org/x", "data_files": "[1"}, "which is no JSON"),
        ({"dataset_name": "org/x", "column_mapping": "[1]"}, "column_mapping is not a mapping"),
        ({"sources": '{"a": {"weight": 2}}'}, "source 'a' is .*expected a path"),
    ],
)
def test_bad_arguments(given, message):
    with pytest.raises(ConfigError, match=message):
        DataArguments(**given)


def test_a_source_names_its_own_split():
    sources = {"a": "org/x", "b": {"path": "org/rows", "split": "validation"}}
    given = DataArguments(sources=json.dumps(sources), dataset_split="test")
    assert given.places() == {"a": Place("org/x", "test"), "b": Place("org/rows", "validation")}
