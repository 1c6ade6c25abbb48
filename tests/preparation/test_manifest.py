"""The manifest: what a user reads, what is stored, and folders of another version."""

from __future__ import annotations

import json

import pytest

from hf_objectives.errors import PreparedDataError
from hf_objectives.labels.ledger import Ledger
from hf_objectives.preparation.config import CorpusConfig
from hf_objectives.preparation.corpus import load_prepared, prepare_corpus
from hf_objectives.preparation.manifest import Manifest
from tests.support.corpora import SMALL, TOKENIZER, write_texts


def test_the_summary_says_what_happened_to_every_token():
    ledger = Ledger()
    account = ledger["a"]
    account.rows_in, account.rows_out, account.tokens_in, account.trained, account.masked = (
        1_200,
        1_195,
        6_000,
        4_000,
        1_000,
    )
    account.drop("longer than max_length", tokens=1_000, row=7)
    manifest = Manifest({"eval_share": 0.1, "max_length": 64}, broken=2, broken_named=["x"])
    manifest.ledgers["train"].merge(ledger)
    assert manifest.lines() == [
        "a: 1200 rows, 6000 tokens = 4000 trained (80.0%) + 1000 masked + 1000 dropped; "
        "1 rows and 1000 tokens dropped (longer than max_length; rows 7)",
        "held out of these: 0 rows of a with 0 tokens",
        "2 broken records skipped, such as x",
    ]


def test_it_is_stored_whole_with_what_the_ledger_gives(tmp_path):
    path = write_texts(tmp_path / "a.jsonl", ["one", "two", "x" * 100])
    made = prepare_corpus({"a": path}, TOKENIZER, tmp_path / "out", CorpusConfig(overflow="truncate", **SMALL))
    stored = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert stored["ledgers"]["train"] == made.ledgers["train"].to_dict()
    read = Manifest.read(tmp_path / "out")
    assert read.lines() == made.lines() and read.shards == made.shards and read.policy == made.policy
    assert read.ledgers["train"]["a"].balance() == 0 and read.num_rows == made.num_rows > 0


def test_folders_of_this_version_are_read_and_older_ones_refused_with_the_reason(tmp_path):
    path = write_texts(tmp_path / "a.jsonl", ["one", "two"])
    config = CorpusConfig(**SMALL)
    prepare_corpus({"a": path}, TOKENIZER, tmp_path / "out", config)
    rows = list(load_prepared(tmp_path / "out", tokenizer=TOKENIZER))
    file = tmp_path / "out" / "manifest.json"
    values = json.loads(file.read_text())
    assert values["policy"]["preparation_version"] == 4
    values["policy"]["preparation_version"] = 2
    file.write_text(json.dumps(values))
    reason = "prepared under version 2 of the rows; this is version 4, which holds out other rows"
    with pytest.raises(PreparedDataError, match=reason):
        load_prepared(tmp_path / "out")
    with pytest.raises(PreparedDataError, match=reason):
        prepare_corpus({"a": path}, TOKENIZER, tmp_path / "out", config)
    prepare_corpus({"a": path}, TOKENIZER, tmp_path / "out", config, overwrite=True)
    assert list(load_prepared(tmp_path / "out")) == rows


def test_a_folder_without_a_manifest_and_a_damaged_one(tmp_path):
    with pytest.raises(PreparedDataError, match="holds no manifest.json"):
        Manifest.read(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(PreparedDataError, match="is damaged"):
        Manifest.read(tmp_path)
