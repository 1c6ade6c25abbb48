"""Sources that go together, and those that do not."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from datasets import Dataset, IterableDataset

from hf_objectives import demo
from hf_objectives.errors import ConfigError, DataError
from hf_objectives.mixture.build import build_mixture
from tests.support.mixtures import source


def texts(n: int, seed: int) -> list[dict]:
    return demo.texts(n, seed=seed)


def test_rows_as_they_are_need_no_tokenizer():
    config = {
        "sources": {
            "a": {"dataset": texts(5, 1), "weight": 1},
            "b": {"dataset": Dataset.from_list(texts(5, 2)), "weight": 1},
        }
    }
    rows = list(itertools.islice(build_mixture({**config, "unit": "examples"}), 10))
    assert Counter(row["source"] for row in rows) == {"a": 5, "b": 5} and set(rows[0]) == {"text", "source"}
    with pytest.raises(
        ConfigError, match="source 'a' has columns text and no input_ids, so that its tokens cannot be counted"
    ):
        build_mixture(config)
    with pytest.raises(ConfigError, match="source 'a': its rows have no input_ids, and there is no tokenizer"):
        build_mixture({**config, "packing": "within", "max_length": 9})


def _nothing():
    yield from ()


@pytest.mark.parametrize(
    ("other", "error", "words"),
    [
        (Dataset.from_dict({"text": []}), DataError, "source 'b': it holds no row; expected one at least"),
        ([], DataError, "source 'b': it holds no row"),
        (IterableDataset.from_generator(_nothing), DataError, "source 'b': it holds no row"),
        (
            Dataset.from_dict({"body": ["x"]}),
            ConfigError,
            "source 'b' has columns body, source 'a' has text; expected the same",
        ),
        ([{"text": "x", "url": "y"}], ConfigError, "source 'b' has columns text, url, source 'a' has text"),
        (Dataset.from_dict({"text": [1]}), ConfigError, "column 'text' of source 'b' is int64, of source 'a' string"),
        (iter([{"text": "x"}]), ConfigError, "source 'b' is an iterator, which can be read once"),
        (
            Dataset.from_dict({"text": ["x"] * 9}).to_iterable_dataset().shuffle(seed=1),
            ConfigError,
            "source 'b' is a shuffled stream, whose buffer cannot be resumed",
        ),
        (
            build_mixture({"sources": {"x": source("a")}}),
            ConfigError,
            "source 'b': the dataset is a stream without an end",
        ),
    ],
    ids=["empty", "empty list", "empty stream", "column", "columns", "type", "iterator", "shuffled", "mixture"],
)
def test_sources_that_do_not_go_together_are_named(other, error, words):
    with pytest.raises(error, match=words):
        build_mixture(
            {
                "sources": {"a": {"dataset": texts(3, 1), "weight": 1}, "b": {"dataset": other, "weight": 1}},
                "unit": "examples",
            }
        )
