"""Generated answers in a run: beside the other figures, in log and trackers, and nothing else is changed by them."""

from __future__ import annotations

import json

import pytest

from hf_objectives.errors import ConfigError
from hf_objectives.recipes import sft

WORDS = (
    "--model_name_or_path builtin --max_length 64 --max_steps 6 --logging_steps 1 --use_cpu true --save_strategy steps"
)


def run(tmp_path, name, *more):
    rows = [{"prompt": f"Say {i % 3}", "completion": str(i % 3)} for i in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [
        *WORDS.split(),
        "--save_steps",
        "2",
        "--eval_strategy",
        "steps",
        "--eval_steps",
        "2",
        "--learning_rate",
        "1e-2",
    ]
    words += [
        "--dataset_name",
        str(tmp_path / "rows.jsonl"),
        "--output_dir",
        str(tmp_path / name),
        "--eval_share",
        "0.3",
    ]
    results = sft.main([*words, *more])
    return results, json.loads((tmp_path / name / "trainer_state.json").read_text())


@pytest.mark.slow
def test_figures_samples_and_the_best_checkpoint(tmp_path, capsys):
    best = ["--load_best_model_at_end", "true", "--metric_for_best_model", "answers_exact_match"]
    more = ["--eval_answers", "8", "--eval_max_new_tokens", "4", "--report_to", "tensorboard", *best]
    results, state = run(tmp_path, "with", *more)
    logged = [entry for entry in state["log_history"] if "eval_answers_exact_match" in entry]
    assert [entry["step"] for entry in logged] == [2, 4, 6, 6]  # and once more at the end
    assert state["best_metric"] == max(entry["eval_answers_exact_match"] for entry in logged)
    for moment in ("before", "after"):
        assert 0 <= results[moment]["eval_answers_exact_match_low"] <= results[moment]["eval_answers_exact_match"] <= 1
    printed = capsys.readouterr().out
    assert "Answers after step 4" in printed and "exact match, held-out answers" in printed
    assert "answers_exact_match" in (tmp_path / "with" / "README.md").read_text()
    events = b"".join(path.read_bytes() for path in (tmp_path / "with").rglob("events.out*"))
    assert b"eval/answers_0" in events and b"expected:" in events
    _, plain = run(tmp_path, "without", "--report_to", "none")
    losses = [[entry["loss"] for entry in found["log_history"] if "loss" in entry] for found in (state, plain)]
    assert losses[0] == losses[1]  # to the bit


def test_rows_to_ask_are_needed(tmp_path):
    with pytest.raises(ConfigError, match="eval_answers needs held-out rows"):
        run(tmp_path, "x", "--eval_answers", "4", "--eval_share", "0", "--eval_strategy", "no", "--report_to", "none")
