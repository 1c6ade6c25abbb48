"""Weights beside the sources, or in a configuration of their own."""

from __future__ import annotations

import json

import pytest
from datasets import Dataset

from hf_objectives.errors import ConfigError
from hf_objectives.recipes.data import mix_rows
from hf_objectives.recipes.data_arguments import read_mixture

SOURCES = {"a": {"path": "a.jsonl", "weight": 1}, "b": "b.jsonl"}


def test_settings_beside_the_sources_and_in_the_mixture_are_joined(tmp_path):
    assert read_mixture(None, {"a": "a.jsonl"}) is None
    assert read_mixture(None, SOURCES) == {"sources": {"a": {"weight": 1}, "b": {}}}
    given = json.dumps({"unit": "rows", "sources": {"a": {"weight": 2}, "b": {"max_epochs": 3}}})
    expected = {"unit": "rows", "sources": {"a": {"weight": 2}, "b": {"max_epochs": 3}}}
    assert read_mixture(given, SOURCES) == expected
    (tmp_path / "mixture.yaml").write_text("unit: rows\nsources: {a: , b: {max_epochs: 3}}\n")
    assert read_mixture(str(tmp_path / "mixture.yaml"), SOURCES)["sources"]["a"] == {"weight": 1}
    assert read_mixture('{"sources": ["anything"]}', {}) == {"sources": ["anything"]}  # where it brings its own


@pytest.mark.parametrize(
    ("mixture", "words"),
    [
        ("{", "mixture cannot be read"),
        ('{"sources": ["a"]}', "expected names with weight"),
        ('{"sources": {"a": 3}}', "expected names with weight"),
        ('{"sources": {"c": {"weight": 1}}}', "mixture names source 'c'; expected one of a, b"),
        ("none.yaml", "mixture names a file that does not exist"),
    ],
)
def test_what_cannot_be_read_is_named(mixture, words):
    with pytest.raises(ConfigError, match=words):
        read_mixture(mixture, SOURCES)


def test_rows_are_mixed_by_their_source():
    rows = Dataset.from_list(
        [{"input_ids": [i, i], "labels": [i, i], "source": name} for i, name in enumerate("abbb", start=5)]
    )
    settings = {"unit": "rows", "sources": {"a": {"weight": 0.5}, "b": {"weight": 0.5}}}
    mixture = mix_rows(settings, rows, max_length=8, packing=False, seed=0)
    first = [next(iter_)["source"] for iter_ in [iter(mixture)] for _ in range(6)]
    assert sorted(first) == ["a"] * 3 + ["b"] * 3
    with pytest.raises(ConfigError, match="source 'c' has no row to train on"):
        mix_rows({"sources": {"c": {}}}, rows, max_length=8, packing=False, seed=0)
