"""hf-objectives inspect, as a user types it."""

from __future__ import annotations

import json

import pytest

from hf_objectives.cli_inspect import inspect
from hf_objectives.errors import ConfigError, FileFormatError


def said(capsys) -> str:
    return " ".join(capsys.readouterr().out.split())


def test_built_in_rows(capsys, tmp_path):
    page = tmp_path / "labels.html"
    words = "--dataset_name builtin --tokenizer builtin --rows 60 --max_length 256 --packing true --examples 2".split()
    inspect([*words, "--html", str(page)])
    out = said(capsys)
    assert "⟦" in out and "<|im_end|>⟧" in out and "rows looked at │ 60 │" in out and "% full" in out
    assert "█" in out and "chat: " in out and page.stat().st_size > 10_000


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


def test_rows_are_spread_and_sources_named(capsys, tmp_path):
    for name in ("one", "two"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": f"{name} {i}"}) + "\n" for i in range(10)))
    sources = {"one": str(tmp_path / "one.jsonl"), "two": {"path": str(tmp_path / "two.jsonl")}}
    inspect(["--sources", json.dumps(sources), "--tokenizer", "builtin", "--rows", "2"])
    out = said(capsys)
    assert "one: 2 of 10 rows, evenly spread" in out and "[one 0]" in out and "[one 5]" in out and "[two 0]" in out


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        ("--dataset_name builtin", ConfigError, "tokenizer is missing"),
        ("--tokenizer builtin", ConfigError, "give dataset_name or sources"),
        ("--dataset_name none.jsonl --tokenizer builtin", FileFormatError, "none.jsonl"),
        ("--dataset_name builtin --tokenizer builtin --rows 0", ConfigError, "expected at least 1"),
        ("--dataset_name builtin --tokenizer builtin --train_on user", ConfigError, "train_on is 'user'"),
        ("--dataset_name builtin --tokenizer builtin --chat_template no.jinja", ConfigError, "does not exist"),
        ("--dataset_name builtin --tokenizer builtin --max_len 3", ConfigError, "did you mean '--max_length'"),
    ],
)
def test_what_cannot_be_inspected(words, error, message):
    with pytest.raises(error, match=message):
        inspect(words.split())


def test_a_folder_that_holds_no_tokenizer(tmp_path):
    with pytest.raises((ConfigError, OSError)):
        inspect(["--dataset_name", "builtin", "--tokenizer", str(tmp_path)])
