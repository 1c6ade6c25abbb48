"""A step and an evaluation of distillation are the same in every layout: micro-batches, and one process or two."""

from __future__ import annotations

import json

import pytest
import torch

from tests.support import distillation_acts
from tests.support.distillation_acts import RUNS, by_layout, layouts
from tests.support.recipes import run_two_processes

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return layouts(tmp_path_factory.mktemp("alone"))


def assert_same(logs: list[dict], weights: dict, whole: dict) -> None:
    assert len(logs) == len(whole["logs"])
    for log, expected in zip(logs, whole["logs"], strict=True):
        assert log == pytest.approx(expected, rel=1e-5, abs=1e-6)
    for key, value in whole["weights"].items():
        assert torch.allclose(weights[key], value, atol=1e-5), key


@pytest.mark.parametrize("name", RUNS)
def test_micro_batches(alone, name):
    parts = alone[f"{name}, 2 x 4"]
    assert_same(parts["logs"], parts["weights"], alone[f"{name}, 8 x 1"])
    steps = [log for log in parts["logs"] if "loss" in log]
    assert len(steps) == 6 and {log["on_policy"] for log in steps} == ({1.0} if "own" in name else {0.0, 1.0})


@pytest.mark.long
@pytest.mark.distributed
def test_two_processes(alone, tmp_path):
    run_two_processes(distillation_acts.__file__, [str(tmp_path)])
    for rank in (0, 1):
        weights = torch.load(tmp_path / f"weights_{rank}.pt", weights_only=True)
        logs = json.loads((tmp_path / "logs_0.json").read_text())
        assert len(weights) == 2 * len(RUNS)
        for key in weights:
            assert_same(logs[key], weights[key], alone[f"{key.split(',')[0]}, 8 x 1"])
    shards = json.loads((tmp_path / "shards_0.json").read_text())
    for tied in (False, True):
        assert shards[f"sharded {tied}"] == pytest.approx(shards[f"whole {tied}"], rel=1e-6)
    assert len(shards["sharded True"]) == 6


def test_a_run_goes_on_in_another_layout(alone, tmp_path):
    """Four micro-batches of two in the place of one of eight, from the middle of an epoch."""
    by_layout(tmp_path / "whole", "both", 8, 1)
    resumed = by_layout(tmp_path / "again", "both", 2, 4, resume=str(tmp_path / "whole" / "checkpoint-4"))
    whole = alone["both, 8 x 1"]
    assert len(resumed["logs"]) == len(whole["logs"])
    for key, value in whole["weights"].items():
        assert torch.allclose(resumed["weights"][key], value, atol=1e-5), key
