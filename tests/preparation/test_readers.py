"""Files as records: every kind, every compression, cut anywhere, and what is wrong with one."""

from __future__ import annotations

import gzip
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_objectives.errors import FileFormatError, FormatError
from hf_objectives.preparation.dataset import prepare_dataset
from hf_objectives.preparation.files import list_files, plan_file
from hf_objectives.preparation.readers import Skipped, load_rows, naming_places, read_segment
from tests.support.chat_corpus import byte_tokenizer

ROWS = [{"text": f"line {i} é"} for i in range(40)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def zst(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as out:
        out.write(data)
    return sink.getvalue().to_pybytes()


def records(path, segment_bytes=1 << 30, documents="blank_line", skipped=None):
    """Rows and numbers of a file, over all its segments."""
    found = []
    for segment in plan_file("s", str(path), segment_bytes=segment_bytes, documents=documents):
        for part in read_segment(segment, skipped=skipped):
            found += zip(part.rows, part.numbers, strict=True)
    return found


def test_each_kind_and_compression(tmp_path):
    (tmp_path / "a.jsonl").write_text(LINES)
    (tmp_path / "a.json").write_text(json.dumps(ROWS, indent=1))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(LINES.encode()))
    (tmp_path / "members.jsonl.gz").write_bytes(
        b"".join(gzip.compress(line.encode()) for line in LINES.splitlines(True))
    )
    (tmp_path / "a.jsonl.zst").write_bytes(zst(LINES.encode()))
    (tmp_path / "frames.jsonl.zst").write_bytes(zst(LINES[:100].encode()) + zst(LINES[100:].encode()))
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(json.dumps(ROWS).encode()))
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet", row_group_size=7)
    files = list_files(str(tmp_path))
    assert len(files) == 8
    for file in files:
        for segment_bytes in (1, 100, 1 << 30):
            assert records(file, segment_bytes) == [(row, i) for i, row in enumerate(ROWS)], file


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.text("ab\n\r é", max_size=8), max_size=12), st.integers(1, 40), st.sampled_from(["\n\n", "\r\n\r\n"])
)
def test_text_cut_anywhere_gives_the_same_documents(tmp_path_factory, parts, segment_bytes, separator):
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_bytes(separator.join(parts).encode())
    text = separator.join(parts).replace("\r\n", "\n")
    expected = [part.strip("\n") for part in text.split("\n\n")]
    found = records(path, segment_bytes)
    assert [row["text"] for row, _ in found] == [part for part in expected if part.strip()]
    lines = text.split("\n")
    for row, number in found:
        assert lines[number] == row["text"].split("\n")[0]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": \n{"text": "c"}\n', "line 2: not valid JSON"),
        ("a.jsonl", b'{"text": "a"}\n\n[1]\n{"text": "c"}\n', "line 3: list; expected an object"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n{"text": "c"}\n', "line 2: not UTF-8 .byte 0xff at 10"),
        ("a.txt", b"one\n\ntwo\n\xe9\n\nthree", "line 4: not UTF-8 .byte 0xe9"),
        ("a.json", b'[{"text": "a"}, 3, {"text": "c"}]', "element 1: int; expected an object"),
        ("a.jsonl.gz", gzip.compress(LINES.encode())[:-20], "damaged or ends too soon"),
        ("a.jsonl.zst", zst(LINES.encode())[:-5], "damaged or ends too soon"),
        ("a.jsonl.gz", b"this is no gzip", "damaged or ends too soon"),
    ],
)
def test_broken_records_are_named_or_counted(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FileFormatError, match=words):
        records(tmp_path / name)
    skipped = Skipped()
    found = records(tmp_path / name, skipped=skipped)
    assert skipped.count == 1 and str(tmp_path / name) in skipped.named[0]
    if name in ("a.jsonl", "a.json"):
        assert [row["text"] for row, _ in found] == ["a", "c"]


def test_a_damaged_parquet_file(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with pytest.raises(FileFormatError, match="not a Parquet file, or is damaged"):
        plan_file("s", str(path), segment_bytes=1 << 20)
    path.write_bytes(whole)
    (segment,) = plan_file("s", str(path), segment_bytes=1 << 20)
    stat = path.stat()
    path.write_bytes(b"\0" * len(whole))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(FileFormatError, match="damaged"):
        list(read_segment(segment))


def test_what_python_reads_and_orjson_refuses(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a", "score": NaN}\n{"text": "b"}\n')
    assert [row["text"] for row, _ in records(tmp_path / "a.jsonl")] == ["a", "b"]


def test_text_by_line_and_by_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo\n\nthree\n")
    assert records(path, documents="line") == [({"text": "one"}, 0), ({"text": "two"}, 1), ({"text": "three"}, 3)]
    assert records(path, documents="file") == [({"text": "one\ntwo\n\nthree"}, 0)]


def test_a_file_that_changes_or_vanishes(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(LINES)
    (segment,) = plan_file("s", str(path), segment_bytes=1 << 20)
    path.write_text(LINES[:200])
    with pytest.raises(FileFormatError, match="changed while it was prepared"):
        list(read_segment(segment))
    path.unlink()
    with pytest.raises(FileFormatError, match="vanished while it was prepared"):
        list(read_segment(segment))
    skipped = Skipped()
    assert not list(read_segment(segment, skipped=skipped)) and skipped.count == 1


TOOLS = [{"text": "a", "tools": [{"x": 1}]}, {"text": "b", "tools": [{"y": {"z": 2}}]}]


def test_all_rows_of_each_kind_of_file_are_loaded(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(TOOLS))
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, TOOLS)) + "\n\n")
    (tmp_path / "lines.json").write_text("\n".join(map(json.dumps, TOOLS)))
    (tmp_path / "a.txt").write_text("one\ntwo\n\n\nthree\n")
    for name in ("a.json", "a.jsonl", "lines.json"):
        assert load_rows(str(tmp_path / name)) == TOOLS  # each row with its own keys
    assert load_rows(str(tmp_path / "a.txt")) == [{"text": "one\ntwo"}, {"text": "three"}]
    assert load_rows(str(tmp_path / "a.txt"), documents="file") == [{"text": "one\ntwo\n\n\nthree"}]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", '{"a": 1}\n{"b": \n', "line 2: not valid JSON"),
        ("a.jsonl", '{"a": 1}\n[1]\n', "line 2: list; expected an object"),
        ("a.json", "[]", "holds no rows"),
        ("a.txt", "\n\n", "holds no rows"),
        ("a.parquet", "nonsense", "is not a Parquet file"),
    ],
)
def test_files_that_cannot_be_loaded_are_named(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    with pytest.raises(FileFormatError, match=words):
        load_rows(str(tmp_path / name))
    with pytest.raises(FileFormatError, match="no such file"):
        load_rows(str(tmp_path / "none.json"))


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jsonl", b'{"text": "one"}\n{"text": "two"}\n'), ("a.json", b'[{"text": "one"}, {"text": "two"}]'),
     ("b.json", b'{"text": "one"}\n{"text": "two"}\n'), ("a.txt", b"one\n\ntwo\n")],
)  # fmt: skip
def test_a_byte_order_mark_is_no_text(tmp_path, name, content):
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content)
    assert [row["text"] for row in load_rows(str(tmp_path / name))] == ["one", "two"]


def test_errors_about_rows_name_file_and_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": "two"}\n')
    (tmp_path / "b.jsonl").write_text('{"text": "three"}\n{"text": 4}\n{"text": "five", "row": 17}\n')
    folder = str(tmp_path)

    def message(source, row):
        with pytest.raises(FormatError) as caught, naming_places({"s": folder}):
            raise FormatError("wrong", source=source, row=row)
        return str(caught.value)

    assert message("s", 1) == f"source 's', row 1: wrong ({tmp_path / 'a.jsonl'}, line 3)"
    assert message("s", 3) == f"source 's', row 3: wrong ({tmp_path / 'b.jsonl'}, line 2)"
    assert message("s", 4) == "source 's', row 4: wrong"  # a row that has a number of its own
    assert message("t", 1) == "source 't', row 1: wrong" and message("s", 9) == "source 's', row 9: wrong"
    with pytest.raises(FormatError, match=r"text is int; expected a string \(.*b.jsonl, line 2\)"):
        prepare_dataset(folder, byte_tokenizer(), max_length=8)
