"""Two processes take the PPO steps of one, on the same answers."""

from __future__ import annotations

import pytest
import torch

from tests.invariant.ppo_acts import ppo_steps
from tests.invariant.test_two_processes import run_on_two


@pytest.mark.distributed
def test_ppo_steps(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    expected_logs = ppo_steps(tmp_path / "one")
    outcomes = run_on_two("ppo_steps", tmp_path / "two")
    expected = torch.load(tmp_path / "one" / "ppo_0.pt")
    for rank, logs in enumerate(outcomes):
        found = torch.load(tmp_path / "two" / f"ppo_{rank}.pt")
        for name, weights in expected.items():
            for key, value in weights.items():
                assert torch.allclose(found[name][key], value, atol=1e-6), (rank, name, key)
            assert len(logs[name]) == len(expected_logs[name]) == 5
            for log, one in zip(logs[name], expected_logs[name], strict=True):
                assert log.keys() == one.keys()
                assert log == pytest.approx(one, rel=1e-4, abs=1e-5), (rank, name)
    for logs in expected_logs.values():
        figures = [log for log in logs if "kl_coef" in log]
        assert figures[0]["rewards/missing"] == 1 and figures[1]["kl_coef"] != figures[0]["kl_coef"]
