"""The options of a corpus and its sources: what cannot work is named."""

from __future__ import annotations

from dataclasses import fields

import pytest

from hf_objectives.errors import ConfigError
from hf_objectives.labels.config import EncodingConfig
from hf_objectives.preparation.config import CorpusConfig, CorpusSettings, Source, difference
from tests.support.corpora import TOKENIZER


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"labels": "never"}, "labels is 'never'; expected one of auto, always"),
        ({"file_format": "csv"}, "file_format is 'csv'; expected one of parquet, arrow"),
        ({"on_error": "skp"}, "did you mean 'skip'"),
        ({"eval_share": 1.0}, "eval_share is 1.0; expected 0 or more, under 1"),
        ({"shard_bytes": 0}, "shard_bytes is 0"),
        ({"strategy": "bfd"}, "strategy is 'bfd'"),
        ({"train_on": "assistent"}, "train_on is 'assistent'; .*did you mean 'assistant'"),
        ({"overlength": "chop"}, "overlength is 'chop'"),
    ],
)
def test_options_that_cannot_work_are_named(options, words):
    with pytest.raises(ConfigError, match=words):
        CorpusConfig(**options)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (3, "source 'a' is int; expected a path or a mapping"),
        ({"pth": "x"}, "source 'a': unknown key 'pth' .did you mean 'path'"),
        ({"path": ""}, "path is ''; expected a file"),
        ({"path": "x", "documents": "lines"}, "source 'a': documents is 'lines'.*did you mean 'line'"),
    ],
)
def test_sources_that_cannot_be_read_are_named(entry, words):
    with pytest.raises(ConfigError, match=words):
        Source.read("a", entry)


def test_a_source_is_a_path_or_a_mapping_with_one():
    assert Source.read("a", "x.jsonl") == Source("a", "x.jsonl")
    assert Source.read("a", ["x", "y"]).path == ("x", "y")
    # A mixture's weight is no part of it.
    assert Source.read("a", {"path": "x.txt", "documents": "line", "weight": 3}) == Source(
        "a", "x.txt", documents="line"
    )


def test_the_encoding_options_are_inherited():
    assert CorpusSettings is CorpusConfig and CorpusConfig(64, "concat", "drop").max_length == 64
    config = CorpusConfig(64, train_on="all", chat_template="{{ messages }}")
    expected = EncodingConfig(max_length=64, train_on="all", chat_template="{{ messages }}", splits_documents=True)
    assert config.encoding() == expected
    # Set by the caller that packs, or by rows; no option of a corpus.
    assert not {"splits_documents", "template_kwargs"} & {option.name for option in fields(CorpusConfig)}


def test_an_argument_is_never_taken_for_another():
    assert CorpusConfig(64, "concat", "drop").overflow == "drop"
    with pytest.raises(TypeError, match="positional arguments"):
        CorpusConfig(64, "concat", "drop", 0.5)


def test_policies_differ_in_what_changes_rows():
    policy = CorpusConfig(64).policy(TOKENIZER)
    assert CorpusConfig(64, num_proc=3, engine="ray", on_error="skip").policy(TOKENIZER) == policy
    other = CorpusConfig(32, eval_seed=1).policy(TOKENIZER)
    assert difference(policy, other) == [
        "max_length: 64 there, 32 asked for",
        "eval_seed: 0 there, 1 asked for",
    ]
    assert difference({"a": 1}, {"b": 2}) == ["b: 'missing' there, 2 asked for", "a: 1 there, 'missing' asked for"]
