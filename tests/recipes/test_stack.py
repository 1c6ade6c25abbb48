"""The whole stack in one command: which checkpoint each stage starts from, and that no question is in both splits."""

from __future__ import annotations

import json

import pytest

from hf_objectives import demo
from hf_objectives.errors import ConfigError
from hf_objectives.recipes import stack
from hf_objectives.recipes.stack import StackArguments, arguments, main, splits_line
from tests.support.recipes import few_built_in


def value_of(words: list[str], option: str) -> str:
    return words[words.index(option) + 1]


def test_each_stage_starts_from_the_one_that_it_builds_on(tmp_path):
    args = StackArguments(output_dir=str(tmp_path))
    starts = {name: value_of(arguments(name, args), "--model_name_or_path") for name in stack.STACK}
    folder = str(tmp_path)
    assert starts == {
        "pretrain": "builtin",
        "sft": f"{folder}/pretrain",
        **dict.fromkeys(("reward", "ppo", "dpo"), f"{folder}/sft"),
        "student": "builtin:small",
        "distill": f"{folder}/student",
    }
    assert value_of(arguments("distill", args), "--teacher_model_name_or_path") == f"{folder}/ppo"


def test_a_skipped_stage_is_passed_over(tmp_path):
    args = StackArguments(output_dir=str(tmp_path), skip=["sft", "reward"], length=0.5, seed=3)
    words = arguments("ppo", args)
    assert value_of(words, "--model_name_or_path") == f"{tmp_path}/pretrain"
    assert value_of(words, "--max_steps") == str(stack.STACK["ppo"].length // 2)
    assert value_of(words, "--seed") != value_of(arguments("dpo", args), "--seed") == "3"  # prompts of its own
    args = StackArguments(output_dir=str(tmp_path), skip=["pretrain", "sft"])
    assert value_of(arguments("dpo", args), "--model_name_or_path") == "builtin"
    args = StackArguments(output_dir=str(tmp_path), skip=["student"])
    assert "distill" in args.skip


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"skip": ["stf"]}, "skip is 'stf'.*did you mean 'sft'"),
        ({"skip": list(stack.STACK)}, "nothing is left to run"),
        ({"length": 0.0}, "length is 0.0"),
        ({"configs": "nowhere"}, "no folder nowhere"),
    ],
)
def test_bad_settings(given, message):
    with pytest.raises(ConfigError, match=message):
        StackArguments(**given)


@pytest.mark.slow
@pytest.mark.parametrize("leak", ["chats", "texts", "preferences"])
def test_a_question_of_the_exam_that_is_trained_is_found(monkeypatch, leak):
    few_built_in(monkeypatch, 300)
    assert splits_line(0).endswith("questions of the exam: none of them was trained")
    row = getattr(demo, leak)(300)[-1]
    words = {"chats": lambda: row["messages"][-2]["content"], "texts": lambda: row["text"].splitlines()[0]}
    trained = demo.Question("sorting", words.get(leak, lambda: row["prompt"][0]["content"])(), "", "")
    monkeypatch.setattr(demo, "exam", lambda each, *, seed: [trained])
    with pytest.raises(AssertionError):
        splits_line(0)


@pytest.mark.long
@pytest.mark.slow
def test_from_fine_tuning_to_a_policy(tmp_path, monkeypatch, capsys):
    """Few and small: a fine-tuned model, and PPO from it; the other stages have recipes, and tests, of their own."""
    pairs = demo.preferences
    few_built_in(monkeypatch, 40)
    # As many prompts to train on as a batch of PPO takes.
    sizes = {"train": 300, "test": 16}
    monkeypatch.setattr(
        demo, "preferences", lambda n, *, split="train", **given: pairs(sizes[split], split=split, **given)
    )
    skipped = ("pretrain", "reward", "dpo", "student")
    rows = main(["--output_dir", str(tmp_path), "--skip", *skipped, "--length", "0.001"])
    assert [row["stage"] for row in rows] == ["sft", "ppo"]
    assert rows[1]["kl"] >= 0 and "kl" not in rows[0] and all(row["seconds"] > 0 for row in rows)
    assert json.loads((tmp_path / "results.json").read_text()) == rows
    assert (tmp_path / "stack.png").exists()
    printed = capsys.readouterr().out
    for row in rows:
        assert f"{row['texts']:.4g}" in printed and f"{row['seconds']:.4g}" in printed
