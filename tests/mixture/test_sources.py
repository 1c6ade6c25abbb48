"""Sources of every kind: prepared folders, files, datasets, streams, rows as they are."""

from __future__ import annotations

import itertools
import json
from collections import Counter

import pytest
from datasets import Dataset, DatasetDict

from hf_objectives import demo
from hf_objectives.collators import DataCollatorWithEosPacking
from hf_objectives.errors import ConfigError, DataError, PreparedDataError
from hf_objectives.mixture.build import build_mixture
from hf_objectives.preparation.config import CorpusConfig
from hf_objectives.preparation.corpus import load_prepared, prepare_corpus
from hf_objectives.preparation.manifest import Manifest
from hf_objectives.preparation.splits import hold_out
from tests.support.chat_corpus import byte_tokenizer, with_bos
from tests.support.corpora import TOKENIZER, write_rows
from tests.support.mixtures import source, taken


def texts(n: int, seed: int) -> list[dict]:
    return [{"text": row["text"]} for row in demo.texts(n, seed=seed)]


@pytest.fixture(scope="module", params=["parquet", "arrow"])
def folder(request, tmp_path_factory):
    """A prepared folder of two sources, with validation."""
    folder = tmp_path_factory.mktemp("mixture")
    for name, count in (("web", 300), ("code", 80)):
        write_rows(folder / f"{name}.jsonl", texts(count, len(name)))
    config = CorpusConfig(64, num_proc=1, file_format=request.param, eval_share=0.1, shard_bytes=8_000)
    named = {name: str(folder / f"{name}.jsonl") for name in ("web", "code")}
    prepare_corpus(named, TOKENIZER, folder / "out", config)
    return folder / "out"


def test_the_sources_of_a_prepared_folder_are_mixed_without_touching_a_token(folder):
    config = {"sources": {"web": {"path": str(folder), "weight": 1}, "code": {"path": str(folder), "weight": 3}}}
    made = build_mixture(config, tokenizer=TOKENIZER)
    tokens, seen = Counter(), {"web": [], "code": []}
    for row in itertools.islice(made, 2_000):
        assert set(row["sources"]) == {row["source"]} and sum(row["seq_lengths"]) == len(row["input_ids"])
        tokens[row["source"]] += len(row["input_ids"])
        seen[row["source"]].append(tuple(map(int, row["input_ids"])))
    assert tokens["code"] / tokens.total() == pytest.approx(0.75, abs=0.002)
    report = made.report(2_000)
    for name, rows in seen.items():
        mapped = Counter(tuple(row["input_ids"]) for row in load_prepared(folder, sources=[name]))
        size = mapped.total()
        for begin in range(0, len(rows) - size + 1, size):
            assert Counter(rows[begin : begin + size]) == mapped
        assert report[name].epochs == pytest.approx(len(rows) / size) and report[name].tokens == tokens[name]
    assert report["code"].epochs > 3
    state = json.loads(json.dumps(made.state_dict(1_234)))
    resumed = build_mixture(config, tokenizer=TOKENIZER)
    resumed.load_state_dict(state)
    assert taken(resumed, 20) == taken(made, 1_254)[1_234:]
    batch = DataCollatorWithEosPacking(TOKENIZER, max_length=64, train_on="all")(list(itertools.islice(made, 4)))
    assert batch["input_ids"].shape == (4, 64)


def test_documents_of_a_prepared_folder_can_be_blocked(folder):
    config = {"sources": {"code": str(folder)}, "unit": "rows"}
    base = build_mixture(config)
    rows = list(itertools.islice(base, base.feeds[0].size))
    whole = next(row for row in rows if len(row["rows"]) == 1)["rows"][0]
    part = next(row for row in rows if len(row["rows"]) > 1)["rows"][0]
    made = build_mixture({**config, "blocklist": {"code": [whole, part]}})
    left = list(itertools.islice(made, made.feeds[0].size))[: len(rows)]
    for row in left:
        assert not {whole, part} & set(row["rows"]) and row["rows"]
        assert sum(row["seq_lengths"]) == len(row["input_ids"]) and len(row["sources"]) == len(row["rows"])
    tokens = {
        n: sum(length for row in rows for r, length in zip(row["rows"], row["seq_lengths"], strict=True) if r == n)
        for n in (whole, part)
    }
    gone = sum(set(row["rows"]) <= {whole, part} for row in rows)
    one_pass = left[: len(rows) - gone]
    assert sum(len(r["input_ids"]) for r in one_pass) == sum(len(r["input_ids"]) for r in rows) - sum(tokens.values())


def test_a_prepared_folder_that_does_not_fit_is_named(folder):
    one = {"web": {"path": str(folder), "weight": 1}}
    with pytest.raises(PreparedDataError, match="source 'web': .*max_length: 64 there, 128 asked for"):
        build_mixture({"sources": one, "max_length": 128})
    with pytest.raises(PreparedDataError, match="source 'web': .*tokenizer: .* there"):
        build_mixture({"sources": one}, tokenizer=with_bos(byte_tokenizer()))
    with pytest.raises(
        ConfigError, match="source 'wab': .* holds web, code; expected a source named like one of them; did"
    ):
        build_mixture({"sources": {"wab": str(folder)}})
    with pytest.raises(ConfigError, match="source 'web': .* holds packed rows, which are not packed across sources"):
        build_mixture({"sources": one, "packing": "across", "max_length": 64})
    with pytest.raises(ConfigError, match="source 'web': trained tokens of prepared rows are not known"):
        build_mixture({"sources": one, "unit": "supervised"})
    with pytest.raises(ConfigError, match="source 'web': .* holds out documents when it is prepared"):
        build_mixture({"sources": {"web": {"path": str(folder), "eval_share": 0.1}}})


def test_what_is_held_out_is_one_evaluation_set(folder, tmp_path):
    both = {name: {"path": str(folder), "eval_split": "validation", "weight": 1} for name in ("web", "code")}
    held = build_mixture({"sources": both}).eval_dataset
    assert set(held["source"]) == {"web", "code"} and set(map(len, held["sources"])) > {1}
    rows = texts(50, 1)
    made = build_mixture(
        {
            "sources": {
                "a": {"dataset": Dataset.from_list(rows), "weight": 1, "eval_share": 0.2},
                "b": {"dataset": texts(30, 2), "weight": 1, "eval_share": 0.1},
            },
            "packing": "across",
            "max_length": 64,
        },
        tokenizer=TOKENIZER,
        seed=3,
    )
    held = made.eval_dataset
    numbers = {"a": hold_out(rows, 0.2, seed=3)[1], "b": hold_out(texts(30, 2), 0.1, seed=3)[1]}
    assert {
        name: [n for s, n in zip(held["source"], held["row"], strict=True) if s == name] for name in "ab"
    } == numbers
    assert 4 <= len(numbers["a"]) <= 16 and 1 <= len(numbers["b"]) <= 8
    out = {(name, number) for name, number in zip(held["source"], held["row"], strict=True)}
    trained = {piece[:2] for row in taken(made, 400) for piece in row}
    assert not out & trained and len(out | trained) == 80
    # Row numbers are those of the source, whatever was held out.
    for row in itertools.islice(made, 30):
        for name, number, ids in zip(row["sources"], row["rows"], _pieces(row), strict=True):
            text = (rows if name == "a" else texts(30, 2))[number]["text"]
            assert TOKENIZER.decode(ids).removesuffix(TOKENIZER.eos_token) in text


def _pieces(row):
    begin = 0
    for length in row["seq_lengths"]:
        yield row["input_ids"][begin : begin + length]
        begin += length


@pytest.mark.parametrize("packing", [None, "within", "across"])
@pytest.mark.parametrize("tokenizer", [byte_tokenizer(), with_bos(byte_tokenizer())], ids=["plain", "bos"])
def test_raw_rows_of_several_formats_are_encoded(tmp_path, packing, tokenizer):
    chats = [row for row in demo.chats(90) if row["source"] == "chat"]
    write_rows(tmp_path / "texts.jsonl", texts(60, 1))
    made = build_mixture(
        {
            "sources": {
                "text": {"data_files": str(tmp_path / "texts.jsonl"), "weight": 0.5, "format": "text"},
                "chat": {"dataset": chats, "weight": 0.5, "format": "messages"},
                "stream": {"dataset": Dataset.from_list(texts(20, 3)).to_iterable_dataset(), "weight": 0.5},
            },
            "packing": packing,
            "max_length": 512 if packing else None,
            "buffer_size": 7,
        },
        tokenizer=tokenizer,
    )
    rows = list(itertools.islice(made, 120))
    assert all(len(row["labels"]) == len(row["input_ids"]) for row in rows)
    tokens = Counter()
    for row in rows:
        for name, ids in zip(
            *((row["sources"], _pieces(row)) if packing else ([row["source"]], [row["input_ids"]])), strict=True
        ):
            tokens[name] += len(ids)
            assert ids[-1] == tokenizer.eos_token_id or name == "chat"
    assert [tokens[name] / tokens.total() for name in made.names] == pytest.approx([1 / 3] * 3, abs=0.06)
    batch = DataCollatorWithEosPacking(tokenizer, max_length=512)(rows[:3])
    assert (batch["labels"] != -100).any()


def test_shares_of_trained_tokens():
    chats = {
        "tool": [row for row in demo.chats(200) if row["source"] == "tool"],
        "chat": [row for row in demo.chats(200) if row["source"] == "chat"],
    }
    config = {"sources": {name: {"dataset": rows, "weight": 0.5} for name, rows in chats.items()}, "unit": "supervised"}
    trained = Counter()
    for row in itertools.islice(build_mixture(config, tokenizer=demo.build_tokenizer()), 600):
        trained[row["source"]] += int((row["labels"] != -100).sum())
    assert trained["tool"] / trained.total() == pytest.approx(0.5, abs=0.005)


def test_a_dataset_dict_and_its_splits():
    both = DatasetDict({"train": source("a"), "test": source("b")})
    made = build_mixture({"sources": {"x": {"dataset": both, "eval_split": "test"}}})
    assert made.feeds[0].size == 40 and len(made.eval_dataset) == 25
    with pytest.raises(ConfigError, match="source 'x': the dataset has no split 'dev'; expected one of train, test"):
        build_mixture({"sources": {"x": {"dataset": both, "eval_split": "dev"}}})


def test_other_bad_sources_are_named(tmp_path):
    one = {"weight": 1}
    with pytest.raises(
        ConfigError, match="source 'a': its rows are of format 'text' .columns text., the configuration says"
    ):
        build_mixture({"sources": {"a": {"dataset": texts(3, 1), "format": "messages", **one}}, "unit": "examples"})
    with pytest.raises(DataError, match="source 'a', row 1: no token; expected one at least"):
        build_mixture({"sources": {"a": Dataset.from_dict({"input_ids": [[1], [], [2]]})}})
    with pytest.raises(Exception, match="source 'a'.*nowhere"):
        build_mixture({"sources": {"a": str(tmp_path / "nowhere.jsonl")}})
    with pytest.raises(ConfigError, match="source 'a': max_epochs is 1.5; expected whole epochs of a stream"):
        build_mixture({"sources": {"a": {"dataset": source("a").to_iterable_dataset(), "max_epochs": 1.5, **one}}})
    with pytest.raises(ConfigError, match="source 'a' is a stream of unknown size; give every source a weight"):
        build_mixture({"sources": {"a": source("a").to_iterable_dataset()}})
    with pytest.raises(DataError, match="source 'a', row 1: columns body; expected text, as in the first row"):
        build_mixture({"sources": {"a": {"dataset": [{"text": "x"}, {"body": "y"}], **one}}, "unit": "examples"})
    with pytest.raises(DataError, match="source 'a', row 1: labels and input_ids have different lengths"):
        build_mixture({"sources": {"a": Dataset.from_dict({"input_ids": [[1], [2, 3]], "labels": [[1], [2]]})}})
    packed = Dataset.from_dict({"input_ids": [[1, 2]], "seq_lengths": [[1, 1]]})
    with pytest.raises(ConfigError, match="source 'a': its rows are packed already"):
        build_mixture({"sources": {"a": packed}, "packing": "across", "max_length": 8})


def test_a_prepared_source_whose_rows_name_other_sources(tmp_path):
    chats = write_rows(tmp_path / "chats.jsonl", demo.chats(30))
    made = prepare_corpus({"chats": chats}, demo.build_tokenizer(), tmp_path / "out", CorpusConfig(256, num_proc=1))
    assert "chats" not in made.sources
    mixture = build_mixture({"sources": {"chats": {"path": str(tmp_path / "out"), "weight": 1}}})
    assert {row["source"] for row in itertools.islice(mixture, 10)} == {"chats"}


def test_a_folder_that_is_not_finished_says_so(tmp_path):
    chats = write_rows(tmp_path / "chats.jsonl", demo.chats(30))
    prepare_corpus({"chats": chats}, demo.build_tokenizer(), tmp_path / "out", CorpusConfig(256, num_proc=1))
    Manifest(Manifest.read(tmp_path / "out").policy).write(tmp_path / "out")  # as at the beginning of preparation
    with pytest.raises(
        PreparedDataError, match="source 'chats': .*out is not finished .*run hf-objectives prepare again"
    ):
        build_mixture({"sources": {"chats": {"path": str(tmp_path / "out"), "weight": 1}}})
