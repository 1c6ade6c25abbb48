"""A run of reinforcement learning, drawn from what its log has."""

from __future__ import annotations

import pytest

from hf_objectives.diagnostics.plot import plot_rewards
from hf_objectives.errors import FileFormatError

LOG = [
    {"step": i, "reward": i / 40, "kl": 0.1, "kl_per_answer": 0.5, "clip_fraction": 0.1, "explained_variance": 0.2}
    for i in range(1, 41)
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "log", [LOG, LOG[:1], [{"step": 1, "reward": 1.0, "kl": None}], [*LOG, {"step": 40, "eval_reward": 1}]]
)
def test_draws_whatever_the_log_has(tmp_path, log):
    assert plot_rewards(log, tmp_path / "deep" / "rewards.png").read_bytes().startswith(b"\x89PNG")


def test_a_log_without_rewards_is_an_error(tmp_path):
    with pytest.raises(FileFormatError, match="no 'reward'"):
        plot_rewards([{"step": 1, "loss": 2.0}], tmp_path / "rewards.png")
