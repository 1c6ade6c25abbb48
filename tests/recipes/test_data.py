"""The rows of a recipe: which are held out, and that each is encoded once."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest
from datasets import Dataset

from hf_objectives import demo
from hf_objectives.errors import ConfigError, ConversationError, PreparedDataError
from hf_objectives.preparation import hold_out, load_rows
from hf_objectives.recipes import data as recipe_data
from hf_objectives.recipes.data import digest, prepare, split_rows
from hf_objectives.recipes.data_arguments import DataArguments, RowArguments

TOKENIZER = demo.build_tokenizer()
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in demo.chats(200)))
    return path


def test_rows_held_out_are_not_trained(tmp_path):
    rows = [{"instruction": q.question, "output": q.answer} for q in demo.questions(60)]
    (tmp_path / "asked.json").write_text(json.dumps(rows))
    data = RowArguments(dataset_name=str(tmp_path / "asked.json"), eval_share=0.2)
    train, held_out = split_rows(data, seed=0, built_in=(1, 1))
    numbers = [row["row"] for row in train], [row["row"] for row in held_out]
    assert numbers == hold_out(load_rows(str(tmp_path / "asked.json")), 0.2, seed=0) and 0 < len(held_out) < 60
    train, held_out = split_rows(RowArguments(), seed=0, built_in=(5, 3))
    assert [row["answer"] for row in train] == [row["answer"] for row in demo.preferences(5)]
    assert [row["row"] for row in held_out] == [0, 1, 2] and {row["source"] for row in train} == {"builtin"}


def test_every_row_is_encoded_once(chats, tmp_path, monkeypatch):
    """Also those of the preview, which are the first and the last encoded rows; and packed rows hold the same tokens."""
    seen = []
    encode = recipe_data.encode_rows

    def counted(rows, *given, **more):
        seen.append(len(rows))
        return encode(rows, *given, **more)

    monkeypatch.setattr(recipe_data, "encode_rows", counted)
    data = DataArguments(dataset_name=str(chats), max_length=256, eval_share=0.1)
    prepared = prepare(data, TOKENIZER, seed=0, output_dir=str(tmp_path))
    assert sum(seen) == 200 and len(seen) == 2 and len(prepared.examples) == 128
    kept = sum(sum(row["seq_lengths"]) for row in prepared.train)
    total = prepared.ledger.total()
    assert kept == total.trained + total.masked and len(prepared.train) < seen[0]
    plain = DataArguments(dataset_name=str(chats), max_length=256, eval_share=0.1, packing=False)
    rows = list(prepare(plain, TOKENIZER, seed=0, output_dir=str(tmp_path)).train)
    assert prepared.examples == rows[:64] + rows[-64:]


def test_rows_that_were_prepared_are_found_again_while_nothing_has_changed(chats, tmp_path, monkeypatch):
    path = tmp_path / "chats.jsonl"
    path.write_bytes(chats.read_bytes())

    def prepared(**options):
        given = {"dataset_name": str(path), "max_length": 256, **options}
        return prepare(DataArguments(**given), TOKENIZER, seed=0, output_dir=str(tmp_path))

    first = prepared()
    with monkeypatch.context() as patched:
        patched.setattr(recipe_data, "encode_rows", None)
        again = prepared(num_proc=2)  # which changes no row
    assert again.train[:] == first.train[:] and again.evaluation[:] == first.evaluation[:]
    assert (
        again.examples == first.examples
        and again.ledger.to_dict() == first.ledger.to_dict()
        and digest(again.train) == digest(first.train)
    )
    path.write_bytes(b"".join(chats.read_bytes().splitlines(keepends=True)[:100]))
    fewer = prepared()
    assert fewer.ledger.total().rows_in < first.ledger.total().rows_in
    (folder,) = {*(tmp_path / "prepared").iterdir()} - {tmp_path / "prepared" / _name(first)}
    (folder / "train.arrow").unlink()
    with pytest.raises(PreparedDataError, match=r"train\.arrow is damaged .*delete .* and prepare again"):
        prepared()


def test_what_decides_rows_names_their_folder(chats, tmp_path):
    """Shares and the order of sources among it; without `keep` nothing is written."""
    sources = [
        {"a": {"path": str(chats), "fraction": share}, "b": {"path": str(chats), "fraction": 0.5}}
        for share in (0.5, 0.1)
    ]
    orders = [{"x": "builtin", "y": "builtin:texts"}, {"y": "builtin:texts", "x": "builtin"}]
    for i, given in enumerate([*sources, *orders]):
        data = DataArguments(sources=json.dumps(given), max_length=256, packing=False, built_in_rows=20)
        made = prepare(data, TOKENIZER, seed=0, output_dir=str(tmp_path / "shared"))
        assert len([*(tmp_path / "shared" / "prepared").iterdir()]) == i + 1
        other = prepare(data, TOKENIZER, seed=0, output_dir=str(tmp_path / "none"), keep=False)
        assert other.train[:] == made.train[:] and other.evaluation[:] == made.evaluation[:]
        assert not (tmp_path / "none").exists()


def _name(prepared):
    return Path(prepared.train.cache_files[0]["filename"]).parent.name


@pytest.mark.long
@pytest.mark.parametrize("pairs", [False, True])
def test_memory_does_not_grow_with_the_rows(pairs):
    """Ten times the rows in the benchmark's own process: what no file backs stays within a fifth (in memory: 2.3, 1.8)."""
    command = [sys.executable, "benchmarks/preparation_memory.py", "--rows", "2000" if pairs else "20000"]
    said = subprocess.run([*command, *["--pairs"] * pairs], check=True, capture_output=True, text=True, cwd=ROOT).stdout
    assert float(said.splitlines()[-1].split(": ")[1].split()[0]) < 1.2, said


def test_few_rows_are_shown_once(chats, tmp_path):
    data = DataArguments(dataset_name=str(chats), max_length=256, eval_share=0.6)
    prepared = prepare(data, TOKENIZER, seed=0, output_dir=str(tmp_path))
    assert 64 < len(prepared.examples) == prepared.ledger.total().rows_out < 128


def test_built_in_rows_of_some_skills():
    train, held_out = split_rows(RowArguments(), seed=0, built_in=(20, 10), skills=["dates"])
    assert {row["skill"] for row in train + held_out} == {"dates"}


def test_chats_and_texts_of_the_built_in_corpus_are_mixed_by_their_names(tmp_path):
    sources = {"talk": "builtin:careless", "tales": {"path": "builtin:texts", "weight": 0.5}}
    data = DataArguments(sources=json.dumps(sources), max_length=256, built_in_rows=30)
    prepared = prepare(data, TOKENIZER, seed=0, output_dir=str(tmp_path))
    assert Counter(prepared.train["source"]) == {"talk": 30, "tales": 30}
    alone = DataArguments(dataset_name="builtin", max_length=256, built_in_rows=30, packing=False)
    assert {*prepare(alone, TOKENIZER, seed=0, output_dir=str(tmp_path)).train["source"]} == {"chat", "tool"}


def test_rows_that_cannot_be_used_are_left_out_and_counted_on_request(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i}!"}]}
        for i in range(20)
    ]
    rows[7]["messages"][1]["role"] = "asistant"
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"dataset_name": str(path), "max_length": 64, "eval_share": 0}
    with pytest.raises(ConversationError, match=r"row 7, turn 1: unknown role 'asistant'.*chats.jsonl, line 8\)"):
        prepare(DataArguments(**options), TOKENIZER, seed=0, output_dir=str(tmp_path))
    prepared = prepare(DataArguments(**options, on_error="skip"), TOKENIZER, seed=0, output_dir=str(tmp_path))
    assert sum(len(row["seq_lengths"]) for row in prepared.train) == 19
    assert prepared.ledger["chats"].dropped_rows == {"ConversationError, skipped": 1}
    for wrong, words in (({"on_error": "stop"}, "on_error"), ({"eval_share": 1.0}, "eval_share is 1.0")):
        with pytest.raises(ConfigError, match=words):
            DataArguments(**{**options, **wrong})


def test_a_checksum_of_rows_does_not_depend_on_how_a_table_is_cut():
    """A launch of several processes reads rows from disk, where they are cut elsewhere."""
    table = pa.table({"input_ids": pa.array([[1, 2], [3], [], [4, 5, 6]], pa.list_(pa.int32())), "row": [0, 1, 2, 3]})
    parts = pa.concat_tables([table.slice(0, 1), table.slice(1)])
    assert digest(Dataset(parts)) == digest(Dataset(table))
    for other in ([[1], [2, 3], [], [4, 5, 6]], [[1, 2], [3], [], [4, 5, 7]]):
        changed = table.set_column(0, "input_ids", pa.array(other, pa.list_(pa.int32())))
        assert digest(Dataset(changed)) != digest(Dataset(table))


def test_a_test_split_of_the_hub_is_held_out_as_a_whole(monkeypatch):
    sizes = {"train": 5, "test": 3}

    def load(place):
        return [{"prompt": f"{place.split} {i}", "completion": "x"} for i in range(sizes[place.split])]

    monkeypatch.setattr(recipe_data, "store_rows", load)
    data = RowArguments(dataset_name="org/rows", dataset_test_split="test")
    train, held_out = split_rows(data, seed=0, built_in=(1, 1))
    assert [row["prompt"] for row in train] == [f"train {i}" for i in range(5)]
    assert [(row["prompt"], row["row"]) for row in held_out] == [(f"test {i}", i) for i in range(3)]
