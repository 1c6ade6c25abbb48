"""A tracker that fails costs its own log and nothing else."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import trackio
from transformers import TrainerCallback

from hf_objectives.trainers import guard_trackers, log_samples
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


class Texts:
    """What TrackioCallback and WandbCallback are to those who log tables."""

    def __init__(self, name, initialized=True, fails=False):
        self.logged, self._initialized = [], initialized
        setattr(self, name, SimpleNamespace(Table=trackio.Table, log=self.log))
        self.fails = fails

    def log(self, values):
        if self.fails:
            raise ConnectionError("no network")
        self.logged.append(values)


def test_samples_reach_trackers_that_take_tables(caplog):
    heard = [Texts("_trackio"), Texts("_wandb", fails=True), Texts("_wandb"), Texts("_wandb", initialized=False)]
    made = SimpleNamespace(callback_handler=SimpleNamespace(callbacks=[*heard, TrainerCallback()]))
    for step in (1, 2):
        log_samples(made, "eval/answers", [{"prompt": "2 + 2?", "said": str(step)}], step)
    for callback in (heard[0], heard[2]):
        tables = [values["eval/answers"].data for values in callback.logged]
        assert tables == [[{"prompt": "2 + 2?", "said": "1"}], [{"prompt": "2 + 2?", "said": "2"}]]
        assert [values["train/global_step"] for values in callback.logged] == [1, 2]
    assert not heard[1].logged and not heard[3].logged
    assert caplog.text.count("Texts failed (ConnectionError: no network); the run goes on without it") == 1
