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
    assert values == [2.9] and notes == [
        "log.csv: 1 lines have more or fewer cells than the header, the first is line 3"
    ]


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


def events(folder, tag, steps, *, level=1.0):
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(folder, filename_suffix="." + tag.replace("/", "_"))
    for step in steps:
        writer.add_scalar(tag, level, step)
    writer.close()


def test_two_tensorboard_writers_of_one_folder_are_one_run(tmp_path):
    events(tmp_path, "train/loss", range(1, 31))
    events(tmp_path, "eval/loss", range(10, 31, 10))
    run = read_curves(tmp_path)
    assert len(run.get("loss").steps) == 30 and len(run.get("eval_loss").steps) == 3
    assert not run.seams and not run.notes


@pytest.mark.parametrize("folder", ["a#b", "a?b", "a%41b", "a b"])
def test_a_database_in_a_folder_of_any_name(tmp_path, folder):
    path = tmp_path / folder / "x.db"
    path.parent.mkdir()
    rows = [(i, json.dumps({"train/loss": 2.5, "train/global_step": i})) for i in (1, 2)]
    rows += [(3, '{"a": NaN, bad'), (4, "[1]"), (5, None)]
    with sqlite3.connect(path) as base:
        base.execute("create table metrics (id integer primary key, run_name text, step integer, metrics text)")
        base.executemany("insert into metrics (run_name, step, metrics) values ('r', ?, ?)", rows)
    run = read_curves(path)
    assert run.get("loss").values.tolist() == [2.5, 2.5]
    assert run.notes == ["3 rows are no JSON objects and were left out, the first is of step 3"]
    assert sorted(one.name for one in tmp_path.iterdir()) == [folder]


# -- exports -------------------------------------------------------------------------------------------------------


def test_an_export_of_wandb_holds_its_runs_side_by_side(tmp_path):
    path = tmp_path / "export.csv"
    heads = [f"{run} - {key}" for run in ("a - 1", "b") for key in ("train/loss", "train/loss__MIN", "train/loss__MAX")]
    rows = [["Step", *heads], ["1", "2.5", "2", "3", "1.5", "1", "2"], ["2", "2.4", "2", "3", "", "", ""]]
    path.write_text("".join(",".join(f'"{cell}"' for cell in row) + "\n" for row in rows))
    assert {run.name: run.get("loss").values.tolist() for run in read_runs(path)} == {"a - 1": [2.5, 2.4], "b": [1.5]}
    assert [list(run.series) for run in read_runs(path)] == [["loss"], ["loss"]]
    path.write_text('"train/global_step","a - train/loss","a - _step"\n10,2.5,1\n20,2.4,2\n')
    run = read_curves(path)
    assert run.get("loss").steps.tolist() == [10, 20] and not run.notes


def test_exports_of_tensorboard_have_their_tag_in_the_name(tmp_path):
    for tag, low in (("train_loss", 2.0), ("eval_loss", 3.0), ("train_grad_norm", 0.5), ("train_train_loss", 9.0)):
        (tmp_path / f"run-.-tag-{tag}.csv").write_text(f"Wall time,Step,Value\n1.0,1,{low}\n2.0,2,{low + 1}\n")
    run = read_curves(tmp_path / "run-.-tag-train_loss.csv")
    assert run.get("loss").values.tolist() == [2.0, 3.0]
    run = read_curves(tmp_path)
    assert {key: one.values[0] for key, one in run.series.items()} == {
        "loss": 2.0,
        "eval_loss": 3.0,
        "grad_norm": 0.5,
        "train_loss": 9.0,
    }


def test_an_index_column_of_pandas_is_no_curve(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text(",loss,epoch,step,eval_loss\n0,2.5,0.1,1,\n1,2.4,0.2,2,\n2,,0.2,2,2.6\n")
    run = read_curves(path)
    assert sorted(run.series) == ["epoch", "eval_loss", "loss"] and not run.notes


@pytest.mark.parametrize("name", ["log.csv", "log.jsonl"])
def test_a_column_of_runs_gives_runs(tmp_path, name):
    rows = [("a", 1, 2.0), ("b", 1, 3.0), ("a", 2, 1.0), ("b", 2, 2.0)]
    lines = [json.dumps({"run": run, "step": step, "loss": loss}) for run, step, loss in rows]
    if name == "log.csv":
        lines = ["run,step,loss", *(f"{run},{step},{loss}" for run, step, loss in rows)]
    (tmp_path / name).write_text("\n".join(lines) + "\n")
    found = {run.name: run.get("loss").values.tolist() for run in read_runs(tmp_path / name)}
    assert found == {"a": [2.0, 1.0], "b": [3.0, 2.0]}


# -- damage --------------------------------------------------------------------------------------------------------


def test_a_csv_that_may_be_cut_short_says_so(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("step,loss\n1,2.5\n2,2.")
    assert losses(path) == ([2.5, 2.0], ["the last line has no line end: it may be cut short"])


def test_a_cell_that_is_too_long_costs_its_line(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("step,loss,text\n1,2.5," + "x" * 200_000 + "\n2,2.4,y\n3,2.3,\n")
    values, notes = losses(path)
    assert values == [2.4, 2.3] and notes[0].startswith(
        "log.csv: 1 lines cannot be read and were left out, the first is line 2 ("
    )
    path.write_text("x" * 200_000 + ",loss\n1,2.5\n")
    with pytest.raises(FileFormatError, match="log.csv, line 1: "):
        read_curves(path)


@pytest.mark.parametrize("name", ["log.jsonl", "log.json"])
def test_a_line_nested_too_deeply_is_left_out(tmp_path, name):
    path = tmp_path / name
    deep = '{"a": ' * 100_000
    lines = ['{"step": 1, "loss": 1}', deep, '{"step": 2, "loss": 1}', '{"step": 3, "loss": 1}']
    path.write_text("\n".join(lines) + "\n" if name == "log.jsonl" else "[" + ",\n".join(lines) + "]")
    values, notes = losses(path)
    assert values[0] == 1 and len(values) >= 2 and len(notes) == 1


@pytest.mark.parametrize("name", ["log.csv", "log.jsonl", "trainer_state.json", "log.txt"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
def test_utf_16_is_named(tmp_path, name, encoding):
    (tmp_path / name).write_text("\ufeff" * (encoding == "utf-16-be") + "step,loss\n1,2.5\n", encoding=encoding)
    with pytest.raises(FileFormatError, match=r"is UTF-16; expected UTF-8"):
        read_curves(tmp_path / name)


def test_a_state_of_one_line_under_another_name(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"best_model_checkpoint": "x" * 6000, "log_history": LINES}))
    assert losses(path) == (LOSSES, [])
    path.write_text(json.dumps({"text": "x" * 6000, "step": 1, "loss": 2.5}) + "\n")  # a long line of a log
    assert losses(path)[0] == [2.5]
