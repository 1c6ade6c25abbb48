"""Where the log of a run is found, and what is said of its units."""

from __future__ import annotations

import json
import math
import os

import pytest

from hf_objectives.diagnostics.curves import Curves, read_curves, read_runs
from hf_objectives.errors import FileFormatError


def state(folder, losses, *, when=None):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "trainer_state.json"
    path.write_text(json.dumps({"log_history": [{"step": i + 1, "loss": loss} for i, loss in enumerate(losses)]}))
    if when:
        os.utime(path, (when, when))
    return path


def test_a_folder_gives_its_own_log_or_that_of_a_later_checkpoint(tmp_path):
    state(tmp_path / "checkpoint-9", [1.0], when=1_000)
    state(tmp_path / "checkpoint-10", [1.0, 2.0], when=1_001)
    assert len(read_curves(tmp_path).get("loss").steps) == 2  # 10 comes after 9
    state(tmp_path, [1.0, 2.0, 3.0], when=2_000)
    assert len(read_curves(tmp_path).get("loss").steps) == 3
    state(tmp_path / "checkpoint-20", [1.0] * 4, when=3_000)  # the run went on
    assert len(read_curves(tmp_path).get("loss").steps) == 4


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
