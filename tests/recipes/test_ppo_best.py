"""The best checkpoint of the PPO recipe by the share of right answers, which every evaluation has."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from hf_objectives import demo
from hf_objectives.errors import ConfigError
from hf_objectives.recipes.ppo import main
from hf_objectives.recipes.run import Recipe
from tests.support.recipes import QUIET, command_line, few_built_in, save_small_model

SHARES = [0.1, 0.2, 0.6, 0.3, 0.6]  # before, after each of three steps, and of the best one again


def arguments(folder, *more: str) -> list[str]:
    given = {
        **QUIET,
        "model_name_or_path": folder / "model",
        "output_dir": folder / "run",
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 8,
        "num_generations": 2,
        "num_iterations": 1,
        "max_completion_length": 4,
        "max_steps": 3,
        "learning_rate": "1e-2",
        "gradient_checkpointing": "false",
        "bf16": "false",
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "load_best_model_at_end": "true",
        "metric_for_best_model": "exact_match",
    }
    return command_line(given, *more)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["ppo", "rloo"])
def test_the_best_by_exact_match(tmp_path, monkeypatch, algorithm):
    few_built_in(monkeypatch, 16)
    save_small_model(tmp_path)
    said = iter(SHARES)
    # A whole Marks would be of two exams; the trainer chooses by this figure alone.
    monkeypatch.setattr(
        Recipe, "examine", lambda self, trainer: SimpleNamespace(figures=lambda: {"exact_match": next(said)})
    )
    results = main(arguments(tmp_path, "--algorithm", algorithm))
    best = tmp_path / "run" / "checkpoint-2"
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(best) and state["best_metric"] == 0.6
    evaluations = [log for log in state["log_history"] if "eval_loss" in log]
    assert [log["eval_exact_match"] for log in evaluations][:3] == SHARES[1:4]
    assert all("eval_reward" in log for log in evaluations)
    assert results["before"]["eval_exact_match"] == 0.1 and results["after"]["eval_exact_match"] == 0.6
    found, kept = load_file(tmp_path / "run" / "model.safetensors"), load_file(best / "model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in kept.items())
    assert (best / "critic.pt").exists() is (algorithm == "ppo")
    assert next(said, None) is None  # measured in each evaluation, once


@pytest.mark.slow
def test_rows_of_a_file_have_no_exact_match(tmp_path, monkeypatch):
    save_small_model(tmp_path)
    (tmp_path / "asked.json").write_text(json.dumps([{"prompt": q.question} for q in demo.questions(40)]))
    (tmp_path / "rewards.py").write_text(
        "def short(completions, **_):\n    return [-float(len(c)) for c in completions]\n"
    )
    more = ["--dataset_name", str(tmp_path / "asked.json"), "--reward_funcs", f"{tmp_path}/rewards.py:short"]
    with pytest.raises(
        ConfigError, match="exact_match is measured on the built-in corpus alone; expected another metric"
    ):
        main(arguments(tmp_path, *more))
    results = main(arguments(tmp_path, *more, "--metric_for_best_model", "reward"))
    assert "eval_exact_match" not in results["after"]
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert history["best_metric"] == max(
        log["eval_reward"] for log in history["log_history"][:-1] if "eval_reward" in log
    )
