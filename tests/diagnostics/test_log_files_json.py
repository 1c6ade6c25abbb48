"""A state's log, whole, long and damaged."""

from __future__ import annotations

import json

import pytest

from hf_objectives.diagnostics.curves import read_curves

LINES = [{"step": i, "loss": 3.0 - i / 10, "learning_rate": 1e-3} for i in range(1, 6)]
LOSSES = [line["loss"] for line in LINES]


def losses(path):
    run = read_curves(path)
    return run.get("loss").values.tolist(), run.notes


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
    monkeypatch.setattr("hf_objectives.diagnostics.log_files.CHUNK", 37)
    path = tmp_path / "trainer_state.json"
    path.write_text(json.dumps({"best_model_checkpoint": "x" * 100, "log_history": LINES}, indent=2))
    assert losses(path) == (LOSSES, [])


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("chunk", [97, 1 << 22])
def test_a_state_is_read_on_behind_damage(tmp_path, monkeypatch, indent, chunk):
    monkeypatch.setattr("hf_objectives.diagnostics.log_files.CHUNK", chunk)
    path = tmp_path / "trainer_state.json"
    lines = [{"step": i, "loss": float(i), "more": {"a": [1, {"b": 2}]}} for i in range(1, 101)]
    text = json.dumps({"log_history": lines, "max_steps": 5}, indent=indent)
    for step in (7, 30, 100):
        at = text.index(f'"step": {step},')
        text = text[:at] + "\0\0\0" + text[at + 3 :]
    path.write_text(text)
    values, notes = losses(path)
    assert values == [float(i) for i in range(1, 101) if i not in (7, 30, 100)]
    assert notes[0] == "it is damaged in 3 places, the first after step 6: what stood there was left out"
    path.write_text(text[: text.index('"step": 40,')])
    values, notes = losses(path)
    assert values[-1] == 39 and "damaged in 2 places" in notes[0] and "still being written" in notes[1]


def test_damage_longer_than_a_piece(tmp_path, monkeypatch):
    path = tmp_path / "trainer_state.json"
    text = json.dumps({"log_history": [{"step": i, "loss": float(i)} for i in range(1, 101)]}, indent=2)
    first, end = text.index('"step": 7,'), text.index('"step": 20,') + 9
    path.write_text(text[:first] + "x" * (end - first) + text[end:])
    for chunk in range(21, 80):
        monkeypatch.setattr("hf_objectives.diagnostics.log_files.CHUNK", chunk)
        values, notes = losses(path)
        assert values == [float(i) for i in range(1, 101) if not 7 <= i <= 20]
        assert notes == ["it is damaged in 1 place, after step 6: what stood there was left out"]


def test_objects_inside_of_entries_do_not_end_a_piece(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_objectives.diagnostics.log_files.CHUNK", 10)
    path = tmp_path / "trainer_state.json"
    lines = [{"step": i, "loss": float(i), "more": [{"a": 1}, {"b": {"c": 2}}, {"d": 3}]} for i in range(9)]
    for indent in (None, 2):
        path.write_text(json.dumps({"log_history": lines, "callbacks": [{"step": 3}, {"step": 4}]}, indent=indent))
        values, notes = losses(path)
        assert values == [float(i) for i in range(9)] and "damaged" not in str(notes)


def test_a_log_that_ends_between_two_entries_is_cut_short(tmp_path):
    path = tmp_path / "trainer_state.json"
    for end in ("", ",", ",\n  "):
        path.write_text('{"log_history": [{"step": 1, "loss": 2.5}' + end)
        values, notes = losses(path)
        assert values == [2.5] and len(notes) == 1 and "ends in the middle of its log" in notes[0]


@pytest.mark.parametrize("junk", ["   ", "},os", ", 7 8"])
def test_what_stands_behind_an_entry_is_not_left_out_in_silence(tmp_path, junk):
    path = tmp_path / "trainer_state.json"
    path.write_text(
        '{"log_history": [{"step": 1, "loss": 2.5}' + junk + '{"step": 2, "loss": 2.0}, {"step": 3, "loss": 1.5}]}'
    )
    values, notes = losses(path)
    assert values[0] == 2.5 and values[-1] == 1.5
    assert notes == ["it is damaged in 1 place, after step 1: what stood there was left out"]
