"""hf-objectives inspect, as a user types it."""

from __future__ import annotations

import json

import pytest

from hf_objectives import demo
from hf_objectives.cli.main import run_command
from hf_objectives.errors import ConfigError, FileFormatError


def inspect(words: list[str]) -> int | None:
    return run_command(["inspect", *words])


def said(capsys) -> str:
    return " ".join(capsys.readouterr().out.split())


def test_built_in_rows(capsys, tmp_path):
    page = tmp_path / "labels.html"
    words = "--dataset_name builtin --tokenizer builtin --rows 60 --max_length 256 --packing true --examples 2".split()
    inspect([*words, "--html", str(page)])
    out = said(capsys)
    assert "⟦" in out and "<|im_end|>⟧" in out and "rows looked at │ 60 │" in out and "% full" in out
    assert "█" in out and "builtin: 60 rows" in out and page.stat().st_size > 10_000


def test_warnings_and_a_terminal_that_data_cannot_steer(capsys, tmp_path):
    row = {
        "messages": [
            {"role": "user", "content": "a\x1b[31m \x9b31m\u202e <|im_end|>"},
            {"role": "assistant", "content": "b"},
        ]
    }
    path = tmp_path / "chats.jsonl"
    path.write_text(f"{json.dumps(row)}\n" * 3)
    inspect(["--dataset_name", str(path), "--tokenizer", "builtin"])
    out = capsys.readouterr().out
    assert "\x1b" not in out and "␛[31m" in out
    assert "\x9b" not in out and "\u202e" not in out
    flat = " ".join(out.split())
    assert "warning control_tokens_in_text: 3 rows" in flat and "warning duplicates: 2 of 3 rows" in flat
    assert "(rows: chats 1, 2)" in flat


def test_json(capsys, tmp_path):
    rows = [{"prompt": "a", "completion": "b"}, {"messages": [{"role": "me", "content": "x"}]}]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code = inspect(
        ["--dataset_name", str(path), "--tokenizer", "builtin", "--json", "--html", str(tmp_path / "a.html")]
    )
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert code == 2 and "a.html" in printed.err
    assert found["statistics"]["rows"] == 2 and [w["kind"] for w in found["warnings"]].count("refused") == 1


def test_rows_are_spread_and_sources_named(capsys, tmp_path):
    for name in ("one", "two"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": f"{name} {i}"}) + "\n" for i in range(10)))
    sources = {"one": str(tmp_path / "one.jsonl"), "two": {"path": str(tmp_path / "two.jsonl")}}
    inspect(["--sources", json.dumps(sources), "--tokenizer", "builtin", "--rows", "2"])
    out = said(capsys)
    assert "one: 2 of 10 rows, evenly spread" in out and "[one 0]" in out and "[one 5]" in out and "[two 0]" in out


def test_one_built_in_corpus_under_two_names(capsys):
    sources = {"one": "builtin", "two": {"path": "builtin", "weight": 2, "max_epochs": 1, "split": "train"}}
    assert inspect(["--sources", json.dumps(sources), "--tokenizer", "builtin", "--rows", "3"]) is None
    out = said(capsys)
    assert "one: 3 rows" in out and "two: 3 rows" in out and "rows looked at │ 6 │" in out
    assert "3 of 6 rows repeat an earlier one" in out and "the first is one 0, again as two 0" in out


def test_a_row_that_cannot_be_used_is_told_and_the_exit_code_is_that_of_an_error(capsys, tmp_path):
    rows = [
        {"messages": [{"role": role, "content": "x"}, {"role": "assistant", "content": "y"}]} for role in ("user", "me")
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert inspect(["--dataset_name", str(path), "--tokenizer", "builtin"]) == 2
    out = said(capsys)
    assert "error refused: 1 of 2 rows cannot be used. chats 1, turn 0: unknown role 'me'" in out and "[chats 0]" in out


def test_stops_are_those_of_the_generation_config(capsys, tmp_path):
    tokenizer = demo.build_tokenizer()
    stop = tokenizer.eos_token_id
    tokenizer.eos_token = "<|im_start|>"
    tokenizer.save_pretrained(tmp_path)
    words = ["--dataset_name", "builtin", "--tokenizer", str(tmp_path), "--rows", "3"]
    inspect(words)
    assert "warning stop_is_not_eos" in said(capsys)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [stop]}))
    inspect(words)
    assert "stop_is_not_eos" not in said(capsys)


def test_a_document_of_a_book_is_shown_in_part(capsys, tmp_path):
    path = tmp_path / "book.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("word " * 20_000, "short")))
    inspect(["--dataset_name", str(path), "--tokenizer", "builtin"])
    out = said(capsys)
    assert "[book 1]" in out and " tokens more" in out


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        ("--dataset_name builtin", ConfigError, "tokenizer is missing"),
        ("--tokenizer builtin", ConfigError, "give dataset_name or sources"),
        ("--dataset_name none.jsonl --tokenizer builtin", FileFormatError, "none.jsonl"),
        ("--dataset_name builtin --tokenizer builtin --rows 0", ConfigError, "expected at least 1"),
        ("--dataset_name builtin --tokenizer builtin --train_on user", ConfigError, "train_on is 'user'"),
        ("--dataset_name builtin --tokenizer builtin --chat_template no.jinja", FileFormatError, "does not exist"),
        ("--dataset_name builtin --tokenizer builtin --max_len 3", ConfigError, "did you mean '--max_length'"),
        ('--sources {"a":{"path":"builtin","weigth":2}} --tokenizer builtin', ConfigError, "'weigth'.*mean 'weight'"),
    ],
)
def test_what_cannot_be_inspected(words, error, message):
    with pytest.raises(error, match=message):
        inspect(words.split())


def test_a_folder_that_holds_no_tokenizer(tmp_path):
    with pytest.raises((ConfigError, OSError)):
        inspect(["--dataset_name", "builtin", "--tokenizer", str(tmp_path)])
