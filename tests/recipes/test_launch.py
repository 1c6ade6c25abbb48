"""What launches write down: their states are told from those that other runs left."""

from __future__ import annotations

import json

import pytest
from transformers import TrainerState

from hf_objectives.recipes.launch import launches_in, state_of

LAUNCHES = [{"id": "a", "begin": 0}, {"id": "b", "begin": 3}]


@pytest.mark.parametrize(
    ("ids", "step", "is_theirs"),
    [
        ("a", 3, True),  # of the first launch, where the second began
        ("a", 6, False),  # the second made step 6 again
        ("ab", 6, True),
        ("b", 6, False),
        ("abc", 6, False),  # the second launch did not begin there
        ("x", 2, False),
        ("", 2, False),  # of a program that writes none
    ],
)
def test_a_state_of_these_launches(tmp_path, ids, step, is_theirs):
    state = TrainerState(global_step=step)
    if ids:
        state.stateful_callbacks["launches"] = [{"id": name} for name in ids]
    state.save_to_json(str(tmp_path / "trainer_state.json"))
    found = state_of(tmp_path / "trainer_state.json", LAUNCHES)
    assert (found is not None) is is_theirs
    assert found is None or found.global_step == step


def test_no_state(tmp_path):
    assert state_of(tmp_path / "trainer_state.json", LAUNCHES) is None


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"settings": {}}', '{"settings": null}'])
def test_a_folder_without_launches(tmp_path, content):
    if content is not None:
        (tmp_path / "environment.json").write_text(content)
    assert launches_in(tmp_path) == []


def test_the_launches_of_a_folder(tmp_path):
    (tmp_path / "environment.json").write_text(json.dumps({"settings": {"launches": LAUNCHES}}))
    assert launches_in(tmp_path) == LAUNCHES
