"""Which files a name stands for, and how they are cut; records are the same wherever a file is cut (test_readers)."""

from __future__ import annotations

import itertools

import pytest

from hf_objectives.errors import ConfigError, FileFormatError
from hf_objectives.preparation.files import is_hub_id, kind_of, list_files, plan_file
from hf_objectives.preparation.readers import load_rows
from tests.support.corpora import write_texts


def test_globs_and_folders(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "notes.md"):
        write_texts(tmp_path / name, ["one", "two"])
    assert [path.rsplit("/", 1)[1] for path in list_files(str(tmp_path / "*.jsonl"))] == ["a.jsonl", "b.jsonl"]
    assert len(list_files(str(tmp_path))) == 2
    assert len(load_rows(str(tmp_path / "?.jsonl"))) == 4
    with pytest.raises(FileFormatError, match="no such file: .*none"):
        list_files(str(tmp_path / "none-*.jsonl"))
    with pytest.raises(ConfigError, match="notes.md ends in .md; expected one of .jsonl"):
        list_files(str(tmp_path / "*"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileFormatError, match="no data files in .*empty"):
        list_files(str(tmp_path / "empty"))


def test_what_is_an_id_of_the_hub(tmp_path):
    assert is_hub_id("owner/name") and is_hub_id("squad")
    assert not any(map(is_hub_id, ("a.jsonl", "a/b.json.gz", "./owner/name", "a/b/c", "a/*", str(tmp_path))))
    assert kind_of("a.json.zst") == ".json" and kind_of("a.zst") is None and kind_of("a") is None


def test_a_plain_file_is_cut_where_records_begin(tmp_path):
    path = write_texts(tmp_path / "a.jsonl", [f"text {i}" for i in range(100)])
    segments = plan_file("s", path, segment_bytes=300)
    content = (tmp_path / "a.jsonl").read_bytes()
    assert len(segments) > 5 and segments[0].begin == 0 and segments[-1].end == len(content)
    for before, after in itertools.pairwise(segments):
        assert before.end == after.begin and content[after.begin - 1 : after.begin] == b"\n"
        assert after.first == content[: after.begin].count(b"\n")
    assert segments[1].place(segments[1].first) == f"{path}, line {segments[1].first + 1}"
    with pytest.raises(ConfigError, match="documents is 'lines'.*did you mean 'line'"):
        plan_file("s", path, segment_bytes=9, documents="lines")
    with pytest.raises(FileFormatError, match="no such file"):
        plan_file("s", str(tmp_path / "b.jsonl"), segment_bytes=9)
