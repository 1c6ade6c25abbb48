"""Tasks in a run: beside the other figures, as often as asked, and nothing else is changed by them."""

from __future__ import annotations

import json

import pytest

from hf_objectives.errors import ConfigError
from hf_objectives.recipes import harness, reward, sft
from tests.support.recipes import few_built_in

WORDS = "--model_name_or_path builtin --max_length 64 --max_steps 6 --logging_steps 1 --use_cpu true --save_strategy no"


@pytest.mark.slow
@pytest.mark.parametrize(("every", "steps"), [(0, [2, 4, 6]), (4, [4])])
def test_figures_at_evaluations(tmp_path, monkeypatch, every, steps):
    """The harness itself is held to hand counts in tests/evaluation/test_harness.py; here a stand-in counts its calls."""
    asked = []

    def evaluate_tasks(model, tokenizer, tasks, manager, **options):
        asked.append((tasks, manager, options))
        return {"own_acc": 0.25}

    monkeypatch.setattr(harness, "check_tasks", lambda tasks, folder: ("manager", folder))
    monkeypatch.setattr(harness, "evaluate_tasks", evaluate_tasks)
    rows = [{"prompt": f"Say {i}", "completion": str(i)} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [*WORDS.split(), "--dataset_name", str(tmp_path / "rows.jsonl"), "--output_dir", str(tmp_path / "run")]
    words += ["--eval_strategy", "steps", "--eval_steps", "2", "--report_to", "none", "--eval_tasks", "own, other"]
    results = sft.main(
        [*words, "--eval_tasks_steps", str(every), "--eval_tasks_limit", "5", "--eval_tasks_folder", "f"]
    )
    log = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in log if "eval_own_acc" in entry] == [*steps, 6]  # and once more at the end
    assert results["before"]["eval_own_acc"] == results["after"]["eval_own_acc"] == 0.25
    assert asked[0] == (["own", "other"], ("manager", "f"), {"limit": 5, "batch_size": 8})


@pytest.mark.slow
def test_a_reward_model_has_no_tasks(tmp_path, monkeypatch):
    few_built_in(monkeypatch, 40)
    words = (
        "--model_name_or_path builtin --dataset_name builtin --max_steps 1 --use_cpu true --bf16 false --eval_tasks x"
    )
    with pytest.raises(ConfigError, match="eval_tasks is for causal language models"):
        reward.main([*words.split(), "--report_to", "none", "--output_dir", str(tmp_path)])
