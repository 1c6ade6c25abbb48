"""The recipe of DPO, from a user's own pairs to a saved model and a table, and what it says when something is wrong."""

from __future__ import annotations

import json
import math
import runpy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_objectives import compute_perplexity, demo
from hf_objectives.errors import ConfigError, FormatError
from hf_objectives.recipes.dpo import main
from tests.support.recipes import QUIET, ROOT, command_line, save_small_model, sharegpt, write_rows


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """A user's folder: a small model, pairs, and texts to watch."""
    folder = tmp_path_factory.mktemp("user")
    save_small_model(folder)
    (folder / "pairs.json").write_text(json.dumps([sharegpt(row) for row in demo.preferences(60)]))
    write_rows(folder / "texts.jsonl", demo.texts(8, split="test"))
    return folder


def arguments(corpus: Path, out: Path, *more: str) -> list[str]:
    given = {
        **QUIET,
        "model_name_or_path": corpus / "model",
        "dataset_name": corpus / "pairs.json",
        "lm_datasets": json.dumps({"mine": str(corpus / "texts.jsonl"), "chats": "builtin"}),
        "output_dir": out,
        "max_length": 128,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "max_steps": 4,
        "learning_rate": "3e-3",
        "bf16": "false",
        "gradient_checkpointing": "false",
        "save_strategy": "no",
    }
    return command_line(given, *more)


@pytest.mark.slow
def test_from_pairs_to_a_model(corpus, tmp_path, capsys):
    results = main(arguments(corpus, tmp_path / "run"))
    before, after = results["before"], results["after"]
    # The content of a row decides whether it is held out, so that a share of 0.1 of 60 pairs is 6 only on average.
    held_out = before["eval_num_pairs"]
    assert held_out == after["eval_num_pairs"] and 1 <= held_out <= 15 and results["num_pairs"] == 60 - held_out
    assert before["eval_rewards/margins"] == 0 and after["eval_rewards/margins"] != 0
    assert after["eval_reference_chosen_perplexity"] == pytest.approx(before["eval_chosen_perplexity"], rel=1e-6)
    change = math.log(before["eval_chosen_perplexity"] / after["eval_chosen_perplexity"])
    assert after["eval_logps_change/chosen"] == pytest.approx(change, abs=1e-6)
    written = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"model.safetensors", "tokenizer.json", "training_curves.png", "results.json", "README.md"} <= written
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == results
    # The saved model has the perplexity that the table says.
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    texts = [json.loads(line) for line in (corpus / "texts.jsonl").read_text().splitlines()]
    eos = tokenizer.eos_token
    found = compute_perplexity(model, tokenizer, [row["text"] + eos for row in texts])
    assert after["eval_mine_perplexity"] == pytest.approx(found.perplexity, rel=1e-4)
    assert after["eval_mine_perplexity_at_start"] == before["eval_mine_perplexity"]
    printed = capsys.readouterr().out
    for words in (
        f"{held_out} held-out pairs",
        "reward accuracy",
        "95 % interval",
        "under the reference",
        "perplexity, mine",
    ):
        assert words in printed, words
    assert "rewards/accuracies" in (tmp_path / "run" / "README.md").read_text()


@pytest.mark.slow
def test_lora_on_what_lora_left(corpus, tmp_path):
    """A folder that holds an adapter: it becomes part of the weights, and the reference is with it."""
    model = AutoModelForCausalLM.from_pretrained(corpus / "model")
    tuned = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False))
    tuned.save_pretrained(tmp_path / "adapter")
    AutoTokenizer.from_pretrained(corpus / "model").save_pretrained(tmp_path / "adapter")
    given = [*arguments(corpus, tmp_path / "run"), "--use_peft", "true", "--lora_target_modules", "all-linear"]
    given[given.index("--model_name_or_path") + 1] = str(tmp_path / "adapter")
    results = main(given)
    assert results["before"]["eval_rewards/margins"] == 0 and results["after"]["eval_rewards/margins"] != 0
    plain = main(arguments(corpus, tmp_path / "plain"))
    assert results["before"]["eval_chosen_perplexity"] != plain["before"]["eval_chosen_perplexity"]
    assert (tmp_path / "run" / "adapter_config.json").exists()


@pytest.mark.slow
def test_built_in_pairs_from_a_config(tmp_path, monkeypatch, capsys):
    """The program as it is launched, but in this process and on few of the pairs."""
    asked = []

    def few(n, *, of=demo.preferences, **given):
        asked.append((n, given.get("split", "train")))
        return of(min(n, 40), **given)

    monkeypatch.setattr(demo, "preferences", few)
    words = "--model_name_or_path builtin --max_steps 1 --eval_strategy no --lm_datasets".split()
    config = ["--config", "dpo_quickstart", "--output_dir", str(tmp_path / "run")]
    monkeypatch.setattr("sys.argv", ["dpo.py", *config, *words, ""])
    runpy.run_path(str(ROOT / "recipes/dpo.py"), run_name="__main__")
    assert asked == [(8_000, "train"), (500, "test")]
    assert "40 held-out pairs" in capsys.readouterr().out


def test_what_it_says_when_something_is_wrong(corpus, tmp_path):
    (tmp_path / "bad.json").write_text(json.dumps([sharegpt(row) for row in demo.preferences(3)] + [{"chosen": "a"}]))
    with pytest.raises(FormatError, match="source 'bad.json', row 3: rejected is missing"):
        main([*arguments(corpus, tmp_path / "a"), "--dataset_name", str(tmp_path / "bad.json"), "--eval_share", "0"])
    with pytest.raises(ConfigError, match="dpop_lambda"):
        main([*arguments(corpus, tmp_path / "b"), "--dpop_lambda", "-1"])
    assert torch.is_grad_enabled()


@pytest.mark.slow
def test_nothing_held_out(corpus, tmp_path):
    words = arguments(corpus, tmp_path / "run", "--eval_share", "0")
    at = words.index("--lm_datasets")
    results = main([*words[:at], *words[at + 2 :]])
    assert results["before"] == results["after"] == {} and results["num_pairs"] == 60
