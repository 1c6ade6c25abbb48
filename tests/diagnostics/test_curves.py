"""Where the log of a run is found, and what is said of its units."""

from __future__ import annotations

import json
import math
import os
import sys

import pytest

from hf_objectives.diagnostics.curves import Curves, read_curves, read_runs
from hf_objectives.errors import ConfigError, FileFormatError


def state(folder, losses, *, when=None):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "trainer_state.json"
    path.write_text(json.dumps({"log_history": [{"step": i + 1, "loss": loss} for i, loss in enumerate(losses)]}))
    if when:
        os.utime(path, (when, when))
    return path


def test_a_folder_of_runs_and_a_list_of_paths(tmp_path):
    state(tmp_path / "a", [1.0, 2.0])
    state(tmp_path / "b", [3.0, 4.0])
    assert [run.name for run in read_runs(tmp_path)] == ["a", "b"]
    assert [run.name for run in read_runs([tmp_path / "b", str(tmp_path / "a"), tmp_path / "a"])] == ["b", "a", "a (2)"]
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "log.jsonl").write_text("")
    runs = read_runs(tmp_path)
    assert len(runs) == 2 and "another run was left out" in runs[0].notes[-1]


def test_several_log_files_of_a_folder_are_several_runs(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text('{"step": 1, "loss": 1}\n{"step": 2, "loss": 1}\n')
    assert [run.name for run in read_runs(tmp_path)] == ["a", "b"]


def test_log_history_and_curves_are_taken_as_they_are():
    run = read_curves([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}])
    assert run.get("loss").values.tolist() == [2.0, 1.0] and "loss" in run and not len(run.get("nothing").steps)
    assert read_curves(run) is run and isinstance(run, Curves)


def test_several_logs_are_read_from_a_list_and_by_name(tmp_path):
    history = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]
    given = Curves("b", read_curves(history).series)
    runs = read_runs([history, given, state(tmp_path / "b", [3.0])])
    assert [run.name for run in runs] == ["run 1", "b", "b (2)"] and runs[1] is given and given.name == "b"
    again = read_runs([given, given])
    assert [run.name for run in again] == ["b", "b (2)"] and given.name == "b"
    assert [run.name for run in read_runs({"x": history, 7: given})] == ["x", "7"]


@pytest.mark.parametrize(
    ("log", "words"),
    [
        ("nowhere", "no log at nowhere"),
        ([1, 2], "entry 0 of the log is 1; expected a mapping"),
        ([], "no curve could be read"),
    ],
)
def test_no_log_is_said(log, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileFormatError, match=words):
        read_curves(log)


def test_an_output_folder_without_a_log_says_what_was_looked_for(tmp_path):
    (tmp_path / "model.safetensors").write_text("x")
    with pytest.raises(FileFormatError, match=r"expected trainer_state.json .* it holds model.safetensors"):
        read_curves(tmp_path)


@pytest.mark.parametrize(
    ("loss", "words"),
    [(2.0, []), (2.0 / math.log(2), ["loss is in bits"]), (8.0, ["loss is 4 times the logarithm of perplexity"])],
)
def test_units_that_do_not_belong_together_are_told(loss, words):
    run = read_curves([{"step": i, "loss": loss, "perplexity": math.exp(2.0)} for i in range(5)])
    assert len(run.notes) == len(words) and all(word in note for word, note in zip(words, run.notes, strict=True))


def log(path, keys=("loss",), steps=40):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"step": i, **dict.fromkeys(keys, 2.0)}) + "\n" for i in range(1, steps)))


def test_other_files_do_not_hide_the_log(tmp_path):
    log(tmp_path / "a" / "train_log.jsonl")
    (tmp_path / "a" / "predictions.jsonl").write_text('{"text": "a"}\n')
    run = read_curves(tmp_path / "a")
    assert run.name == "a" and len(run.get("loss").steps) == 39
    assert len(run.notes) == 1 and "predictions.jsonl: no curve could be read" in run.notes[0]
    # Another pattern, and one that gives curves but no training loss.
    log(tmp_path / "b" / "metrics.jsonl", keys=("eval_loss",))
    (tmp_path / "b" / "log.csv").write_text("step,loss\n1,2.5\n2,2.4\n")
    run = read_curves(tmp_path / "b")
    assert run.get("loss").values.tolist() == [2.5, 2.4] and "metrics.jsonl: no curve of training loss" in run.notes[0]
    # A state without lines.
    log(tmp_path / "c" / "log.jsonl")
    (tmp_path / "c" / "trainer_state.json").write_text('{"log_history": []}')
    assert len(read_curves(tmp_path / "c").get("loss").steps) == 39
    # A data file above run folders.
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n')
    runs = read_runs(tmp_path)
    assert [one.name for one in runs] == ["a", "b", "c"] and any("train.jsonl" in note for note in runs[0].notes)


def test_events_are_found_beside_data(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(tmp_path) as writer:
        for step in range(1, 31):
            writer.add_scalar("train/loss", 2.0, step)
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n')
    run = read_curves(tmp_path)
    assert len(run.get("loss").steps) == 30 and "train.jsonl" in run.notes[0]


def test_a_folder_of_files_without_a_curve_is_an_error(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(FileFormatError, match=r"a.jsonl: no curve could be read.*\(and 1 more file\)"):
        read_curves(tmp_path)


def test_a_missing_package_is_named_before_a_file_that_is_no_log(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard.backend.event_processing.event_accumulator", None)
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "events.out.tfevents.1.host").write_bytes(b"\x18\0\0\0")
    with pytest.raises(ConfigError, match=r"tensorboard.*\(and 1 more file\)"):
        read_curves(tmp_path)


def test_a_missing_package_for_one_run_leaves_the_other_runs(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard.backend.event_processing.event_accumulator", None)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "events.out.tfevents.1.host").write_bytes(b"\x18\0\0\0")
    log(tmp_path / "b" / "log.jsonl")
    (run,) = read_runs(tmp_path)
    assert run.name == "b" and "another run was left out" in run.notes[-1] and "tensorboard" in run.notes[-1]


def test_no_training_loss_is_said():
    (run,) = read_runs([{"step": i, "eval_loss": 2.0, "accuracy": 0.5} for i in (1, 2)])
    assert run.notes == ["no curve of training loss; found: eval_loss, accuracy"]
    (run,) = read_runs([{"step": i, **{f"m{k}": 1.0 for k in range(12)}} for i in (1, 2)])
    assert run.notes == ["no curve of training loss; found: m0, m1, m2, m3, m4, m5, m6, m7 and 4 more"]


def test_a_log_history_of_several_runs():
    runs = read_runs([{"run": name, "step": i, "loss": 1.0} for i in (1, 2) for name in ("a", "b\x1b")])
    assert [(run.name, len(run.get("loss").steps)) for run in runs] == [("a", 2), ("b␛", 2)]


def test_notes_and_errors_do_not_steer_the_terminal():
    run = read_curves([{"step": 1, "loss": 1.0, "\x1b[31mred": "high"}])
    assert run.notes == ["␛[31mred: 1 values that are no numbers were left out, the first 'high'"]
    with pytest.raises(FileFormatError, match="␛"):
        read_curves([{"step": 1, "\x1b[31mred": "high"}])
