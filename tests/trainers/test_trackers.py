"""A tracker that fails costs its own log and nothing else."""

from __future__ import annotations

import pytest
from transformers import TrainerCallback

from hf_objectives.trainers import guard_trackers
from tests.support.language_models import trainer


class Tracker(TrainerCallback):
    def __init__(self):
        self.heard = 0

    def on_log(self, args, state, control, **kwargs):
        self.heard += 1
        raise ConnectionError("no network")


def run(tmp_path, callback):
    made = trainer(tmp_path, max_steps=3, logging_steps=1)
    made.add_callback(callback)
    guard_trackers(made)
    made.train()
    return made


def test_it_is_told_once_and_heard_no_more(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(Tracker, "__module__", "transformers.integrations.mine")
    callback = Tracker()
    assert run(tmp_path, callback).state.global_step == 3 and callback.heard == 1
    assert [record.message for record in caplog.records].count(
        "Tracker failed (ConnectionError: no network); the run goes on without it"
    ) == 1


def test_callbacks_of_others_still_raise(tmp_path):
    with pytest.raises(ConnectionError):
        run(tmp_path, Tracker())
