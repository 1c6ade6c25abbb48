"""Curves from any place that a log can be."""

from __future__ import annotations

import json

import pytest

from hf_objectives.diagnostics.plot import plot_training_metrics, read_log
from hf_objectives.errors import FileFormatError

LOG = [
    {"step": i, "loss": 3 - i / 30, "perplexity": 9.0, "learning_rate": 1e-3, "grad_norm": 1.0} for i in range(1, 41)
]
EVALUATED = [
    *LOG,
    {"step": 40, "eval_loss": 2.0, "eval_perplexity": 7.4, "eval_a_perplexity": 8.0, "eval_b_perplexity": 7.0},
]


@pytest.mark.parametrize("log", [LOG, EVALUATED, LOG[:1], [{"step": 1, "eval_loss": 2.0}]])
@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_draws_whatever_the_log_has(tmp_path, log, ending):
    path = plot_training_metrics(log, tmp_path / "deep" / f"curves.{ending}")
    start = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[ending]
    assert path.read_bytes().startswith(start)


def test_finds_the_log(tmp_path):
    state = json.dumps({"log_history": LOG})
    checkpoint = tmp_path / "run" / "checkpoint-40"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text(state)
    for place in (checkpoint / "trainer_state.json", checkpoint, tmp_path / "run"):
        assert read_log(place) == LOG
    (tmp_path / "run" / "trainer_state.json").write_text(json.dumps({"log_history": EVALUATED}))
    assert read_log(tmp_path / "run") == EVALUATED


def test_logs_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(FileFormatError, match="no trainer_state.json under"):
        read_log(tmp_path)
    with pytest.raises(FileFormatError, match="no log at"):
        read_log(tmp_path / "x.json")
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(FileFormatError, match="is not a trainer_state.json"):
        read_log(tmp_path / "x.json")
    with pytest.raises(FileFormatError, match="nothing to draw"):
        plot_training_metrics([{"step": 1}])
