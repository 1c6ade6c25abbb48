"""Rows on disk: the same rows as in memory, in any order, and nothing left behind."""

from __future__ import annotations

import datetime
import json
import math

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from hf_objectives.errors import ConfigError, DiskFullError, FileFormatError
from hf_objectives.preparation import ChainedRows, Place, SelectedRows, load_rows, mapped_tables, store_rows
from hf_objectives.preparation import stored as stored_module
from hf_objectives.preparation.splits import rows_between

ROWS = [
    {"messages": [{"role": "user", "content": f"é {i}"}], **({"tools": [{f"k{i}": i}]} if i % 3 else {})}
    for i in range(50)
]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path, cache):
    """Files of every kind; in their order Parquet stands between kinds that are kept as text."""
    path = tmp_path / "rows"
    path.mkdir()
    (path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS) + '\n{"score": NaN}\n')
    (path / "b.json").write_text(json.dumps(ROWS[:3]))
    when = datetime.datetime(2026, 1, 2, 3, 4, 5, 678)  # no JSON
    pq.write_table(pa.table({"text": ["one", None], "at": [when, when], "raw": [b"\x00", b"\xff"]}), path / "c.parquet")
    pq.write_table(pa.table({"text": ["two"]}), path / "d.parquet")
    (path / "e.txt").write_text("first\n\nsecond\n")
    return path


def test_rows_on_disk_are_those_in_memory(folder, cache):
    rows, expected = store_rows(Place(str(folder))), load_rows(str(folder))
    assert repr(list(rows)) == repr(expected) and len(rows) == len(expected) == 59  # NaN is not equal to itself
    assert math.isnan(rows[50]["score"]) and rows[-1] == {"text": "second"}
    with pytest.raises(IndexError):
        rows[59]
    assert repr(rows[48:57:2]) == repr(expected[48:57:2]) and rows[59:] == []
    numbers = np.array([58, 0, 54, 54, 56, 3])
    assert repr(rows.take(numbers)) == repr([expected[i] for i in numbers])
    assert not list(cache.glob("*"))  # no name is left


@given(st.data())
def test_selected_and_chained_rows_are_those_of_lists(data):
    sizes = data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=4))
    parts = [[{"text": f"{part} {i}"} for i in range(size)] for part, size in enumerate(sizes)]
    chosen = [data.draw(st.lists(st.sampled_from(range(size)), unique=True)) if size else [] for size in sizes]
    selected = [
        SelectedRows(
            Dataset.from_list(rows) if rows and data.draw(st.booleans()) else rows,
            np.array(sorted(some), np.int64),
            "x",
        )
        for rows, some in zip(parts, chosen, strict=True)
    ]
    expected = [
        {**rows[i], "source": "x", "row": i} for rows, some in zip(parts, chosen, strict=True) for i in sorted(some)
    ]
    chained = ChainedRows(selected)
    assert list(chained) == expected == chained[:] and len(chained) == len(expected)
    numbers = data.draw(st.lists(st.sampled_from(range(len(expected))))) if expected else []
    assert chained.take(numbers) == [expected[i] for i in numbers]


def test_columns_are_renamed_as_in_memory(folder):
    (folder.parent / "asked.jsonl").write_text('{"q": "1", "text": "old"}\n{"a": "2", "q": "3"}\n')
    place = Place(str(folder.parent / "asked.jsonl"), column_mapping={"q": "text"})
    assert list(store_rows(place)) == load_rows(place) == [{"text": "1"}, {"a": "2", "text": "3"}]
    with pytest.raises(ConfigError, match="no column 'question'; it has q, text, a"):
        store_rows(Place(place.path, column_mapping={"question": "text"}))


def test_what_cannot_be_read_names_its_place(folder, cache):
    (folder / "a.jsonl").write_text('{"text": "x"}\n{"text": \n')
    with pytest.raises(FileFormatError, match=r"a\.jsonl, line 2: not valid JSON"):
        store_rows(Place(str(folder)))
    (folder / "a.jsonl").write_text("\n")
    with pytest.raises(FileFormatError, match=r"a\.jsonl holds no rows"):
        store_rows(Place(str(folder / "a.jsonl")))
    assert not list(cache.glob("*"))


def test_a_full_disk_is_named(cache, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stored_module.pa.ipc, "new_stream", full)
    with pytest.raises(DiskFullError, match="no space left to write rows in .*cache"):
        mapped_tables([pa.table({"x": [1]})])


def test_a_read_only_cache_is_replaced_by_the_temporary_folder(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file" / "cache")
    (found,) = mapped_tables([pa.table({"x": [1]}), pa.table({"x": [2]})])
    assert found["x"].to_pylist() == [1, 2] and mapped_tables([]) == []


def test_dictionaries_that_change_and_long_integers(tmp_path, cache):
    """Categories of pandas, and what only Python's parser reads, beside a column of the name that texts have."""
    path = tmp_path / "rows"
    path.mkdir()
    for name in "ab":
        table = pa.table({"text": pa.array([name, f"{name}2"]).dictionary_encode(), "json": [1, 2]})
        pq.write_table(table, path / f"{name}.parquet")
    nested = json.dumps([[]])
    for _ in range(150):
        nested = f"[{nested}]"
    (path / "c.json").write_text(f'[{{"id": {10**30}, "score": NaN, "deep": {nested}}}]')
    assert repr(list(store_rows(Place(str(path))))) == repr(load_rows(str(path)))


def test_images_are_not_decoded_and_json_is():
    features = datasets.Features({"image": datasets.Image(), "turns": datasets.List(datasets.Json())})
    empty = {"bytes": b"x", "path": None}
    rows = Dataset.from_dict({"image": [empty], "turns": [[{"a": 1}, {"b": "2"}]]}, features)
    assert rows_between(rows, 0, 1) == [{"image": empty, "turns": [{"a": 1}, {"b": "2"}]}]


def test_a_stream_of_the_hub_is_read_once_and_keeps_what_its_rows_hold(tmp_path, cache, monkeypatch):
    """Messages with keys of their own are JSON in a dataset: they come back as messages, not as text."""
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    load, asked = datasets.load_dataset, []

    def load_here(name, config, *, split, streaming, **files):
        asked.append((name, split, streaming))
        return load("json", data_files=str(path), split=split, streaming=streaming)

    monkeypatch.setattr("hf_objectives.preparation.places.load_dataset", load_here)
    rows = store_rows(Place("org/chats", streaming=True, column_mapping={"messages": "turns"}))
    assert (
        asked == [("org/chats", "train", True)]
        and isinstance(rows, Dataset)
        and rows.column_names == ["turns", "tools"]
    )
    assert [row["turns"] for row in SelectedRows(rows, np.arange(50), "chats")] == [row["messages"] for row in ROWS]
    assert not list(cache.rglob("*.arrow"))
    path.write_text('{"messages": [')
    with pytest.raises(ConfigError, match="org/chats: "):
        store_rows(Place("org/chats", streaming=True))
    with pytest.raises(ConfigError, match="streaming of source 'a' is 'false'; expected true or false"):
        Place.read("a", {"path": "org/chats", "streaming": "false"}, Place(""))
