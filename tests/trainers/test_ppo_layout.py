"""PPO is the same however a step is split into micro-batches; `tests/invariant/test_two_processes.py` has two processes."""

from __future__ import annotations

import pytest

from hf_objectives.errors import ConfigError
from tests.support.ppo_acts import by_layout, layout_figures

RUN = "one batch a step"


def assert_same(run: dict, whole: dict) -> None:
    for step, one in zip(run["steps"], whole["steps"], strict=True):
        assert sorted(step) == sorted(one)
    expected = layout_figures(whole)
    for key, value in layout_figures(run).items():
        if "train_loss" not in key:  # of the steps since the run went on
            assert value == pytest.approx(expected[key], rel=1e-5, abs=1e-7), key


@pytest.mark.slow
def test_a_run_goes_on_in_another_layout_at_the_end_of_an_epoch(tmp_path):
    """Four steps an epoch: the answers are used up there. Within the epochs over answers it is refused."""
    whole = by_layout(tmp_path / "whole", RUN, 8, 1, save_strategy="steps", save_steps=1, num_iterations=2)
    checkpoint = str(tmp_path / "whole" / "checkpoint-4")
    resumed = by_layout(tmp_path / "again", RUN, 2, 4, resume=checkpoint, num_iterations=2)
    assert len(resumed["steps"]) == 2
    assert_same(resumed, {**whole, "steps": whole["steps"][4:]})
    checkpoint = str(tmp_path / "whole" / "checkpoint-5")
    with pytest.raises(ConfigError, match="this run with 2 x 4 x 1"):
        by_layout(tmp_path / "refused", RUN, 2, 4, resume=checkpoint, num_iterations=2)
    with pytest.raises(ConfigError, match="answers that are not used up, split into.*'steps_per_generation': 1"):
        by_layout(tmp_path / "refused", RUN, 2, 4, resume=checkpoint, num_iterations=2, ignore_data_skip=True)
