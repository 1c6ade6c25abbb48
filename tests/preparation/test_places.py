"""Where rows lie: the Hub's subsets, splits and columns, object stores, and files as the Hub's cache links them."""

from __future__ import annotations

import json

import datasets
import fsspec
import pytest
from datasets import Dataset

from hf_objectives.errors import ConfigError, FileFormatError
from hf_objectives.preparation import Place, load_rows, local_files


@pytest.fixture
def hub_set(tmp_path, monkeypatch):
    """A dataset with two subsets and two splits, as the Hub's repositories have them, under the name `org/talks`."""
    folder = tmp_path / "repository"
    for subset, size in (("short", 4), ("long", 20)):
        for split in ("train", "test"):
            (folder / subset).mkdir(parents=True, exist_ok=True)
            rows = [{"question": f"{subset} {split} {i}", "answer": str(i)} for i in range(size)]
            (folder / subset / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    configs = [
        {"config_name": name, "data_files": [{"split": s, "path": f"{name}/{s}.jsonl"} for s in ("train", "test")]}
        for name in ("short", "long")
    ]
    (folder / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    load, names = datasets.load_dataset, datasets.get_dataset_config_names
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = "hf_objectives.preparation.places."
    monkeypatch.setattr(
        f"{path}load_dataset", lambda name, *a, **k: load(str(folder), *a, cache_dir=str(tmp_path / "c"), **k)
    )
    monkeypatch.setattr(f"{path}get_dataset_config_names", lambda name, revision: names(str(folder)))
    return "org/talks"


def test_a_subset_a_split_and_columns(hub_set):
    place = Place(hub_set, "test", "long", column_mapping={"question": "prompt", "answer": "completion"})
    rows = load_rows(place)
    assert len(rows) == 20 and rows[3] == {"prompt": "long test 3", "completion": "3"}
    assert len(load_rows(Place(hub_set, "train[:10%]+test", "long"))) == 22
    assert load_rows(Place(hub_set, data_files="short/test.jsonl"))[0]["question"] == "short test 0"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"config": "lnog"}, r"org/talks: no subset 'lnog'; expected one of short, long; did you mean 'long'\?"),
        ({}, "org/talks: dataset_config is missing; expected one of short, long"),
        (
            {"config": "long", "split": "tset"},
            r"org/talks: Unknown split \"tset\". Should be one of \['train', 'test'\]",
        ),
        ({"config": "long", "column_mapping": {"qestion": "prompt"}}, "no column 'qestion'; it has question, answer"),
        ({"data_files": "none/*.jsonl"}, "org/talks: No .*data files found"),
    ],
)
def test_what_is_missing_is_named_beside_what_is_there(hub_set, given, message):
    with pytest.raises(ConfigError, match=message):
        load_rows(Place(hub_set, **given))


def test_a_version_is_that_of_the_files_and_a_commit_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n')
    place = Place("json", data_files=str(path), revision="v2")
    first = place.version()
    assert first == place.version() and place.commit() == "v2"  # the files of a machine have none
    path.write_text('{"text": "a"}\n{"text": "b"}\n')
    assert place.version() != first
    found = type("Builder", (), {"hash": "c0ffee" * 6 + "abcd"})
    monkeypatch.setattr("hf_objectives.preparation.places.load_dataset_builder", lambda *_, **given: found)
    assert place.commit() == "c0ffee" * 6 + "abcd"
    monkeypatch.undo()
    assert Place("org/none", revision="v2").commit() == "v2"
    with pytest.raises(ConfigError, match="org/none: "):
        Place("org/none").version()


def test_a_subset_whose_names_cannot_be_asked_for_is_one_line_too(hub_set, monkeypatch):
    def fail(name, revision):
        raise ConnectionError("offline")

    monkeypatch.setattr("hf_objectives.preparation.places.get_dataset_config_names", fail)
    with pytest.raises(ConfigError, match="org/talks: .*lnog"):
        load_rows(Place(hub_set, config="lnog"))


def test_no_connection_is_one_line():
    with pytest.raises(ConfigError, match="org/none: .*") as error:
        load_rows("org/none")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "rows", [[{"q": "a", "prompt": "old"}, {"q": "b", "x": 1}], Dataset.from_list([{"q": "a", "prompt": "old"}])]
)
def test_a_column_that_is_renamed_takes_the_place_of_one_of_that_name(rows):
    found = Place("x.json", column_mapping={"q": "prompt"}).rename(rows)
    assert found[0] == {"prompt": "a"}


def test_columns_may_change_places():
    place = Place("x.json", column_mapping={"a": "b", "b": "a"})
    assert place.rename([{"a": 1, "b": 2}]) == [{"b": 1, "a": 2}]
    assert place.rename(Dataset.from_list([{"a": 1, "b": 2}]))[0] == {"b": 1, "a": 2}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"path": "a.json", "wieght": 1}, "source 's': unknown key 'wieght'"),
        ({"split": "train"}, "expected a path, or a mapping with path"),
        ({"path": "a.json", "config": "x"}, "a.json, is no dataset of the Hub; config is for those"),
        ({"path": "a.json", "column_mapping": ["x"]}, "expected their names and ours"),
    ],
)
def test_sources_that_cannot_be(source, message):
    with pytest.raises(ConfigError, match=message):
        Place.read("s", source, Place(""), ("weight",))


def test_a_source_overrides_what_holds_for_all():
    place = Place.read("s", {"path": "org/x", "split": "test", "weight": 2}, Place("", "train", "long"), ("weight",))
    assert place == Place("org/x", "test", "long")


@pytest.fixture
def store(tmp_path, monkeypatch):
    """An object store, in memory."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    files = fsspec.filesystem("memory")
    for folder in ("a", "b"):
        files.pipe(f"/bucket/{folder}/rows.jsonl", json.dumps({"text": folder}).encode() + b"\n")
    yield files
    files.rm("/bucket", recursive=True)


def test_an_object_store(store):
    assert load_rows("memory://bucket/*/rows.jsonl") == [{"text": "a"}, {"text": "b"}]
    first = local_files("memory://bucket/a/rows.jsonl")
    assert local_files("memory://bucket/a/rows.jsonl") == first  # copied once
    store.pipe("/bucket/a/rows.jsonl", b'{"text": "new"}\n')
    assert load_rows("memory://bucket/a/rows.jsonl") == [{"text": "new"}]


@pytest.mark.parametrize(
    ("address", "error", "message"),
    [
        ("memory://bucket/none.jsonl", FileFormatError, "no such file: memory://bucket/none.jsonl"),
        ("memory://bucket/*.jsonl", FileFormatError, "no such file"),
        ("nowhere://bucket/a.jsonl", ConfigError, "cannot be read .*nowhere"),
        ("s3://bucket/a.jsonl", ConfigError, "cannot be read .*s3fs"),
    ],
)
def test_an_address_that_cannot_be_read(store, address, error, message):
    with pytest.raises(error, match=message):
        local_files(address)


def test_links_as_the_hubs_cache_lays_them(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshots").mkdir()
    (tmp_path / "blobs" / "0a1b").write_text('{"text": "x"}\n')
    (tmp_path / "snapshots" / "rows.jsonl").symlink_to(tmp_path / "blobs" / "0a1b")
    assert load_rows(str(tmp_path / "snapshots")) == [{"text": "x"}]
