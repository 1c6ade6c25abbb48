"""What a report shows of the files beside a log, also where they are damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hf_objectives.diagnostics.report import (
    read_differences,
    read_environment,
    read_events,
    read_labels,
    run_folder,
)


def test_the_folder_of_a_file_and_of_a_checkpoint(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint-5"
    checkpoint.mkdir()
    (checkpoint / "trainer_state.json").touch()
    for run in (tmp_path, checkpoint, str(checkpoint / "trainer_state.json")):
        assert run_folder(run) == tmp_path
    assert run_folder([{"step": 1}]) is None


def test_without_files_there_is_nothing_and_no_note(tmp_path: Path) -> None:
    notes: list[str] = []
    for folder in (tmp_path, None):
        assert read_labels(folder, notes) == read_events(folder, notes) == []
        assert read_environment(folder, notes) == ([], []) and read_differences(folder, folder, notes) is None
    assert notes == []


@pytest.mark.parametrize(
    ("content", "note"),
    [
        ('[{"pieces": 3}]', "labels.json holds {'pieces': 3}; expected"),
        ('{"a": 1}', "labels.json holds dict; expected list"),
        ("[", "labels.json cannot be read"),
        ("[" * 200 + "]" * 200, "labels.json is nested more than 50 deep"),
        ("[" * 100_000 + "]" * 100_000, "labels.json"),
    ],
    ids=["pieces", "kind", "damage", "deep", "deepest"],
)
def test_a_file_that_cannot_be_read_is_a_note(tmp_path: Path, content: str, note: str) -> None:
    (tmp_path / "labels.json").write_text(content)
    notes: list[str] = []
    assert read_labels(tmp_path, notes) == [] and len(notes) == 1 and notes[0].startswith(note)


def test_settings_are_flat_and_compared_by_name(tmp_path: Path) -> None:
    for name, rate in (("a", 0.1), ("b", 0.2)):
        (tmp_path / name).mkdir()
        content = {
            "versions": {"torch": "2", "trl": None},
            "world_size": 2,
            "settings": {"optim": {"rate": rate}, "x": {}},
        }
        (tmp_path / name / "environment.json").write_text(json.dumps(content))
    environment, settings = read_environment(tmp_path / "a", [])
    assert environment == [("torch", "2"), ("trl", "not installed"), ("world size", "2")]
    assert settings == [("optim.rate", "0.1"), ("x", "{}")]
    assert read_differences(tmp_path / "a", tmp_path / "b", []) == [("optim.rate", "0.1", "0.2")]


def events_of(folder: Path, **steps: list[dict[str, Any]]) -> None:
    for name, examples in steps.items():
        path = folder / "diagnostics" / name
        path.mkdir(parents=True)
        event = {"step": int(name.removeprefix("step_")), "kind": "spike", "loss": "nan", "examples": examples}
        (path / "event.json").write_text(json.dumps(event))


def test_events_are_in_order_and_the_examples_that_stand_out_first(tmp_path: Path) -> None:
    masked = {"source": "a", "row": 1, "loss": None, "text": "masked"}
    broken, high = {**masked, "loss": "nan"}, {**masked, "loss": 9.5}
    suspect = {**masked, "loss": 1.0, "suspect": True}
    events_of(tmp_path, step_10=[masked] * 12 + [high, broken, suspect], step_9=[])
    notes: list[str] = []
    first, second = read_events(tmp_path, notes)
    assert (first["step"], second["step"], second["folder"]) == (9, 10, "step_10") and notes == []
    assert [row["loss"] for row in second["examples"]] == [1.0, "nan", 9.5] + [None] * 9


def test_of_many_events_the_first_are_shown(tmp_path: Path) -> None:
    events_of(tmp_path, **{f"step_{i}": [] for i in range(25)})
    notes: list[str] = []
    assert [event["step"] for event in read_events(tmp_path, notes)] == list(range(20))
    assert notes == ["of 25 events of the monitor the first 20 are shown"]
