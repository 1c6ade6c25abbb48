"""The picture of a reward model, from whatever its log has."""

from __future__ import annotations

import pytest
from matplotlib.image import imread

from hf_objectives.diagnostics.plot import plot_reward_model
from hf_objectives.evaluation.calibration import reliability

TRAINED = [{"step": step, "loss": 0.7 / step, "accuracy": 1 - 0.5 / step} for step in range(1, 40)]
HELD_OUT = [
    {"step": step, "eval_loss": 0.6, "eval_accuracy": 0.7, "eval_accuracy_low": 0.6, "eval_accuracy_high": 0.8}
    for step in (0, 20, 40)
]


@pytest.mark.parametrize("log", [TRAINED, HELD_OUT, []])
def test_draws(tmp_path, log):
    diagrams = {"before": reliability([0.1, -0.2, 0.0]), "after": reliability([3.0, 2.0, -1.0])}
    path = plot_reward_model(log, diagrams, tmp_path / "deep" / "picture.png")
    assert path == tmp_path / "deep" / "picture.png" and imread(path).std() > 0


def test_says_what_is_drawn(tmp_path):
    """Text of an SVG: the error of the diagram, by hand, and the names of what is drawn."""
    path = plot_reward_model(TRAINED + HELD_OUT, {"after": reliability([100.0, -100.0])}, tmp_path / "picture.svg")
    text = path.read_text()
    for words in ("after, ECE 0.500", "calibrated", "95 % interval", "Loss (nats per pair)", "held out"):
        assert f"<!-- {words} -->" in text
