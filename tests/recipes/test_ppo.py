"""The recipe of reinforcement learning: PPO and TRL's trainers from one config, with rewards of every kind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification
from trl import RLOOConfig

from hf_objectives import PPOConfig, demo
from hf_objectives.errors import ConfigError, DataError
from hf_objectives.recipes.ppo import as_config, main, read_reward
from hf_objectives.trainers.reward_functions import RewardError
from tests.support.recipes import QUIET, command_line, few_built_in, save_small_model

REWARDS = """
def short(prompts, completions, **_):
    return [-float(len(one[-1]["content"])) for one in completions]

def fails(prompts, completions, **_):
    raise ZeroDivisionError("nothing to divide by")
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """A user's folder: a small model, a reward model, questions in a file, and reward functions."""
    folder = tmp_path_factory.mktemp("user")
    model, tokenizer = save_small_model(folder)
    torch.manual_seed(0)
    model.config.num_labels = 1
    LlamaForSequenceClassification(model.config).save_pretrained(folder / "judge")
    tokenizer.save_pretrained(folder / "judge")
    rows = [{"instruction": q.question, "output": q.answer} for q in demo.questions(60)]
    (folder / "asked.json").write_text(json.dumps(rows))
    (folder / "rewards.py").write_text(REWARDS)
    return folder


def arguments(corpus: Path, out: Path, *more: str) -> list[str]:
    given = {
        **QUIET,
        "model_name_or_path": corpus / "model",
        "output_dir": out,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 8,
        "steps_per_generation": 2,
        "num_generations": 2,
        "num_iterations": 1,
        "max_completion_length": 6,
        "max_steps": 2,
        "learning_rate": "1e-3",
        "gradient_checkpointing": "false",
        "bf16": "false",
        "save_strategy": "no",
    }
    return command_line(given, *more)


@pytest.mark.slow
def test_from_files_to_a_policy_with_two_rewards(corpus, tmp_path, capsys):
    rewards = ["--reward_funcs", f"{corpus}/rewards.py:short", str(corpus / "judge"), "--reward_weights", "1", "0.5"]
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps(row) + "\n" for row in demo.texts(8)))
    watched = json.dumps({"mine": str(texts), "chats": "builtin"})
    out = tmp_path / "run"
    dataset = ["--dataset_name", str(corpus / "asked.json"), "--lm_datasets", watched]
    results = main(arguments(corpus, out, *dataset, *rewards))
    log = json.loads((out / "trainer_state.json").read_text())["log_history"]
    trained = [entry for entry in log if "loss" in entry]
    answered = [entry for entry in trained if "reward" in entry]
    assert len(trained) == 2 and len(answered) == 1  # two minibatches of one batch of answers
    for entry in answered:
        parts = entry["rewards/short/mean"] + 0.5 * entry["rewards/judge/mean"]
        assert entry["reward"] == pytest.approx(parts, abs=1e-5)
    assert {"eval_mine_perplexity", "eval_chats_perplexity", "eval_reward"} <= set(results["after"])
    written = {path.name for path in out.iterdir()}
    assert {"model.safetensors", "tokenizer.json", "training_curves.png", "results.json", "README.md"} <= written
    before = AutoModelForCausalLM.from_pretrained(corpus / "model").state_dict()
    after = AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    printed = capsys.readouterr().out
    assert "mean reward" in printed and "rewards short, judge" in printed


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["rloo", "grpo"])
def test_trls_own_trainers_run_from_the_same_config(corpus, tmp_path, monkeypatch, algorithm):
    few_built_in(monkeypatch, 24)
    results = main(arguments(corpus, tmp_path / "run", "--algorithm", algorithm))
    assert results["algorithm"] == algorithm and "eval_reward" in results["after"]
    assert f"- {algorithm}" in (tmp_path / "run" / "README.md").read_text()


def test_trls_config_has_the_values_of_ours(tmp_path):
    given = {"learning_rate": 3e-4, "beta": 0.07, "num_generations": 4, "epsilon": 0.3, "max_completion_length": 9}
    sizes = {"per_device_train_batch_size": 8, "steps_per_generation": 3}
    ours = PPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", **given, **sizes)
    theirs = as_config(RLOOConfig, ours)
    assert type(theirs) is RLOOConfig and theirs.generation_batch_size == 24
    assert {name: getattr(theirs, name) for name in given} == given
    ours.num_generations = 1
    with pytest.raises(ConfigError, match="num_generations is 1"):
        as_config(RLOOConfig, ours)


def test_reward_functions_are_found_or_their_absence_named(corpus):
    assert read_reward("builtin") is demo.answer_reward
    assert read_reward("org/judge") == "org/judge"
    short = read_reward(f"{corpus}/rewards.py:short")
    assert short(prompts=None, completions=[[{"content": "abc"}]]) == [-3.0]
    with pytest.raises(ConfigError, match="no function 'shrt'; did you mean 'short'"):
        read_reward(f"{corpus}/rewards.py:shrt")
    with pytest.raises(ConfigError, match="does not exist"):
        read_reward(f"{corpus}/nothing.py:short")


@pytest.mark.slow
def test_bad_settings(corpus, tmp_path, monkeypatch):
    few_built_in(monkeypatch, 24)
    with pytest.raises(ConfigError, match="algorithm is 'pp'.*did you mean 'ppo'"):
        main(arguments(corpus, tmp_path, "--algorithm", "pp"))
    with pytest.raises(ConfigError, match="unknown option --critc; did you mean"):
        main(arguments(corpus, tmp_path, "--critc", "none"))
    with pytest.raises(RewardError, match=r"'fails' raised ZeroDivisionError.*answer 0 of"):
        main(arguments(corpus, tmp_path, "--reward_funcs", f"{corpus}/rewards.py:fails"))


def test_a_row_without_a_prompt_is_left_out_on_request(corpus, tmp_path):
    rows = [{"instruction": q.question, "output": q.answer} for q in demo.questions(12)]
    del rows[5]["instruction"]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--dataset_name", str(tmp_path / "asked.jsonl"), "--eval_share", "0", "--max_steps", "1"]
    words += ["--reward_funcs", f"{corpus}/rewards.py:short"]
    with pytest.raises(DataError, match=r"asked\.jsonl, line 6"):
        main(arguments(corpus, tmp_path / "run", *words))
    results = main(arguments(corpus, tmp_path / "run", *words, "--on_error", "skip"))
    assert list(results["prompts_left_out"].values()) == [[5]]


@pytest.mark.slow
def test_what_an_algorithm_has_no_setting_for_is_said(corpus, tmp_path, monkeypatch, capsys):
    few_built_in(monkeypatch, 24)
    main(arguments(corpus, tmp_path / "run", "--algorithm", "rloo", "--missing_eos_penalty", "0.5", "--max_steps", "1"))
    said = " ".join(capsys.readouterr().out.split())
    assert "Left out, since rloo has no such setting:" in said and "missing_eos_penalty=0.5" in said
    with pytest.raises(ConfigError, match="loads its reference by the model's name"):
        main(arguments(corpus, tmp_path, "--algorithm", "rloo", "--model_name_or_path", "builtin"))
