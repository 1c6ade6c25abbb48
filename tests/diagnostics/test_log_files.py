"""Every file format that a log is kept in, whole and damaged."""

from __future__ import annotations

import json
import sqlite3

import pytest

from hf_objectives.diagnostics.curves import read_curves, read_runs
from hf_objectives.errors import FileFormatError

LINES = [{"step": i, "loss": 3.0 - i / 10, "learning_rate": 1e-3} for i in range(1, 6)]
LOSSES = [line["loss"] for line in LINES]


def losses(path):
    run = read_curves(path)
    return run.get("loss").values.tolist(), run.notes


def test_json_lines_of_the_document(tmp_path):
    path = tmp_path / "log.jsonl"
    lines = [{"step": i, "train_loss": 3.0 - i / 10, "val_loss": 4.0} for i in range(1, 6)]
    path.write_text("\n".join(map(json.dumps, lines)))
    run = read_curves(path)
    assert run.get("loss").values.tolist() == LOSSES and run.get("eval_loss").values.tolist() == [4.0] * 5


def test_json_lines_with_nan_blank_and_broken_ones(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1, "loss": NaN}\n\nnot json\n[1]\n{"step": 2, "loss": 1.5}\n{"step": 3, "lo')
    values, notes = losses(path)
    assert str(values) == "[nan, 1.5]"
    assert notes == [
        "line 6, the last, is cut short: the log is damaged there or still being written",
        "2 lines are no JSON objects and were left out, the first is line 3",
    ]


@pytest.mark.parametrize("indent", [None, 2])
def test_a_state_is_read_whole_or_as_far_as_it_goes(tmp_path, indent):
    path = tmp_path / "trainer_state.json"
    whole = json.dumps({"best_metric": None, "epoch": 1.0, "log_history": LINES, "max_steps": 5}, indent=indent)
    path.write_text(whole)
    assert losses(path) == (LOSSES, [])
    path.write_text(whole[: whole.index('"step": 4') + 5])
    values, notes = losses(path)
    assert values == LOSSES[:3] and "still being written" in notes[0]


def test_a_state_with_nan_and_nested_values(tmp_path):
    path = tmp_path / "trainer_state.json"
    lines = [{"step": 1, "loss": float("nan"), "more": {"a": [1, {"b": 2}]}}, *LINES[1:]]
    path.write_text(json.dumps({"log_history": lines}, indent=2))
    values, _ = losses(path)
    assert values[1:] == LOSSES[1:] and values[0] != values[0]


def test_a_state_longer_than_what_is_read_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_objectives.diagnostics.log_files._CHUNK", 37)
    path = tmp_path / "trainer_state.json"
    path.write_text(json.dumps({"best_model_checkpoint": "x" * 100, "log_history": LINES}, indent=2))
    assert losses(path) == (LOSSES, [])


def test_an_array_of_lines(tmp_path):
    path = tmp_path / "log.json"
    path.write_text(json.dumps(LINES))
    assert losses(path) == (LOSSES, [])


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_csv_with_holes(tmp_path, delimiter):
    path = tmp_path / "log.csv"
    rows = [["Step", "train/loss", "eval/loss"], ["1", "2.9", ""], ["2", "2.8", "3.5"], ["3", "", "3.4"]]
    path.write_text("\n".join(delimiter.join(row) for row in rows))
    run = read_curves(path)
    assert run.get("loss").values.tolist() == [2.9, 2.8] and run.get("eval_loss").steps.tolist() == [2, 3]


def test_csv_with_a_short_line_says_so(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("step,loss\n1,2.9\n2\n")
    values, notes = losses(path)
    assert values == [2.9] and notes == ["1 lines have more or fewer cells than the header"]


def test_tensorboard_events_of_a_resumed_run(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    for first in (1, 3):
        writer = SummaryWriter(tmp_path / "runs" / "host")
        for step in range(first, first + 4):
            writer.add_scalar("train/loss", 10 * first + step, step)
        writer.close()
    run = read_curves(tmp_path)
    assert run.get("loss").steps.tolist() == [1, 2, 3, 4, 5, 6]
    assert run.get("loss").values.tolist() == [11, 12, 33, 34, 35, 36] and run.seams == [3]


def test_trackios_database_by_run(tmp_path):
    path = tmp_path / "project.db"
    with sqlite3.connect(path) as base:
        base.execute("create table metrics (id integer primary key, run_name text, step integer, metrics text)")
        for run, first in (("one", 1.0), ("two", 2.0)):
            rows = [(run, i, json.dumps({"train/loss": first, "train/global_step": 10 * i})) for i in range(1, 4)]
            base.executemany("insert into metrics (run_name, step, metrics) values (?, ?, ?)", rows)
    runs = read_runs(path)
    assert [(run.name, run.get("loss").steps.tolist(), run.get("loss").values[0]) for run in runs] == [
        ("one", [10, 20, 30], 1.0),
        ("two", [10, 20, 30], 2.0),
    ]
    with pytest.raises(FileFormatError, match="holds 2 runs \\(one, two\\); expected one"):
        read_curves(path)


def test_what_trackio_writes_itself_is_read(tmp_path, monkeypatch):
    """A contract with trackio's own file: its table and columns."""
    from trackio.sqlite_storage import SQLiteStorage

    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path)
    SQLiteStorage.bulk_log("project", "a run", [{"train/loss": 2.5}, {"train/loss": 2.25}], steps=[1, 2])
    (path,) = tmp_path.glob("*.db")
    (run,) = read_runs(path)
    assert run.name == "a run" and run.get("loss").values.tolist() == [2.5, 2.25]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("log.jsonl", b"", "is empty; a log has lines such as"),
        ("log.jsonl", b"   \n ", "is empty"),
        ("log.txt", b"Epoch 1, loss 2.3", "no log that is known"),
        ("log.jsonl", b"nothing\nhere\n", "no curve could be read"),
        ("log.jsonl", b'{"loss": 1.0}\n', "1 of 1 lines name no step"),
        ("log.jsonl", b'{"step": 1, "loss": "high"}\n', "values that are no numbers"),
        ("trainer_state.json", b'{"epoch": 1.0}', "it has no log_history"),
        ("trainer_state.json", b'{"log_history": []}', "no curve could be read"),
        ("log.csv", b"step,loss\n", "no curve could be read"),
        ("x.db", b"SQLite format 3\0" + b"x" * 200, "not one that trackio wrote"),
    ],
)
def test_what_cannot_be_read_says_what_is_missing(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FileFormatError, match=words):
        read_curves(tmp_path / name)
