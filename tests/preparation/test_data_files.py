"""Rows of local files, and what is wrong with one."""

from __future__ import annotations

import json

import pytest
from datasets import Dataset

from hf_objectives.errors import ConfigError, FileFormatError
from hf_objectives.preparation.data_files import hold_out, load_rows

ROWS = [{"text": "a", "tools": [{"x": 1}]}, {"text": "b", "tools": [{"y": {"z": 2}}]}]


def test_each_kind_of_file(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, ROWS)) + "\n\n")
    (tmp_path / "lines.json").write_text("\n".join(map(json.dumps, ROWS)))
    (tmp_path / "a.txt").write_text("one\ntwo\n\n\nthree\n")
    Dataset.from_list([{"text": "a"}]).to_parquet(tmp_path / "a.parquet")
    for name in ("a.json", "a.jsonl", "lines.json"):
        assert load_rows(str(tmp_path / name)) == ROWS
    assert load_rows(str(tmp_path / "a.txt")) == [{"text": "one\ntwo"}, {"text": "three"}]
    assert load_rows(str(tmp_path / "a.parquet")) == [{"text": "a"}]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.json", '[{"a": 1},\n {"b": }]', "line 2: not valid JSON"),
        ("a.jsonl", '{"a": 1}\n{"b": \n', "line 2: not valid JSON"),
        ("a.jsonl", '{"a": 1}\n[1]\n', "line 2: list; expected an object"),
        ("a.json", '{"a": 1}', "holds dict; expected a list"),
        ("a.json", "[]", "holds no rows"),
        ("a.txt", "\n\n", "holds no rows"),
        ("a.parquet", "nonsense", "is not a Parquet file"),
    ],
)
def test_broken_files_are_named(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    with pytest.raises(FileFormatError, match=words):
        load_rows(str(tmp_path / name))


def test_missing_and_unknown_files(tmp_path):
    with pytest.raises(FileFormatError, match="no such file"):
        load_rows(str(tmp_path / "none.json"))
    (tmp_path / "a.csv").write_text("a")
    with pytest.raises(ConfigError, match="ends in .csv"):
        load_rows(str(tmp_path / "a.csv"))


def test_hold_out():
    keep, out = hold_out([{}] * 100, 0.1)
    assert len(out) == 10 and sorted(keep + out) == list(range(100))
    assert hold_out([{}] * 100, 0.1) == (keep, out) != hold_out([{}] * 100, 0.1, seed=1)
    assert hold_out([{}] * 3, 0.0) == ([0, 1, 2], [])
    assert len(hold_out([{}] * 3, 0.01)[1]) == 1
    with pytest.raises(ConfigError, match="under 1"):
        hold_out([{}], 1.0)
    with pytest.raises(ConfigError, match="leaves nothing"):
        hold_out([{}], 0.5)
