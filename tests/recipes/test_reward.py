"""The recipe of reward models, from a user's own files to a folder that scores."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_objectives import demo
from hf_objectives.errors import ConfigError, DataError, FileFormatError
from hf_objectives.preparation import hold_out
from hf_objectives.recipes.reward import main
from tests.support.recipes import QUIET, command_line, run_two_processes, save_small_model, sharegpt


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """A user's folder: a small model, and pairs in a file."""
    folder = tmp_path_factory.mktemp("user")
    save_small_model(folder)
    (folder / "pairs.json").write_text(json.dumps([sharegpt(row) for row in demo.preferences(111)]))
    return folder


def arguments(corpus: Path, out: Path, *more: str) -> list[str]:
    given = {
        **QUIET,
        "model_name_or_path": corpus / "model",
        "dataset_name": corpus / "pairs.json",
        "output_dir": out,
        "max_length": 128,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 4,
        "max_steps": 6,
        "bf16": "false",
        "gradient_checkpointing": "false",
        "save_strategy": "no",
        "learning_rate": "1e-2",
    }
    return command_line(given, *more)


def scores(folder: Path, conversations: list[list[dict]]) -> list[float]:
    """As any program scores with a folder: text of the template, the folder's tokenizer and model."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1).eval()
    model.config.pad_token_id = tokenizer.pad_token_id
    texts = tokenizer.apply_chat_template(conversations, tokenize=False)
    with torch.no_grad():
        return (
            model(**tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)).logits[:, 0].tolist()
        )


@pytest.mark.slow
def test_from_a_file_to_a_folder_that_scores(corpus, tmp_path, capsys):
    results = main(arguments(corpus, tmp_path / "run", "--max_steps", "30"))
    before, after = results["before"], results["after"]
    assert after["eval_loss"] < before["eval_loss"] and 4 <= after["eval_num_pairs"] <= 20
    assert sum(results["reliability"]["after"]["counts"]) == after["eval_num_pairs"]
    written = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"model.safetensors", "tokenizer.json", "training_curves.png", "results.json", "README.md"} <= written
    assert json.loads((tmp_path / "run" / "results.json").read_text())["after"] == after
    printed = capsys.readouterr().out
    for words in (
        "The plan",
        f"{after['eval_num_pairs']} held-out pairs",
        "95 % interval",
        "calibration",
        "preferring the longer answer",
    ):
        assert words in printed
    card = (tmp_path / "run" / "README.md").read_text()
    row = next(line for line in card.splitlines() if line.startswith("| accuracy |"))
    assert row.endswith(f"| {before['eval_accuracy']:.4g} | {after['eval_accuracy']:.4g} |")
    assert "reward model" in card
    # Another program gives the rows that were held out the rewards that the evaluation reports.
    _, held_out = hold_out(json.loads((corpus / "pairs.json").read_text()), 0.1, seed=42)
    pairs = [demo.preferences(111)[i] for i in held_out]
    found = scores(tmp_path / "run", [pair["prompt"] + pair[side] for pair in pairs for side in ("chosen", "rejected")])
    assert after["eval_min_reward"] == pytest.approx(min(found), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("merge", ["true", "false"])
def test_lora(corpus, tmp_path, merge):
    """Merged or not, the folder scores as the trainer did."""
    words = ("--use_peft", "true", "--lora_target_modules", "all-linear", "--merge_adapter", merge)
    # Nearly all pairs are held out, so that the largest and the smallest reward are known from outside.
    results = main(arguments(corpus, tmp_path / "run", *words, "--eval_share", "0.99"))
    written = {path.name for path in (tmp_path / "run").iterdir()}
    assert ("model.safetensors" in written) == (merge == "true")
    assert ("adapter_model.safetensors" in written) == (merge == "false")
    pairs = demo.preferences(111)
    found = scores(tmp_path / "run", [row["prompt"] + row[side] for row in pairs for side in ("chosen", "rejected")])
    for name, value in (("min", min(found)), ("max", max(found))):
        # One pair or two were not held out.
        assert results["after"][f"eval_{name}_reward"] == pytest.approx(value, abs=0.2)
    assert any(abs(value - results["after"]["eval_max_reward"]) < 1e-5 for value in found)
    assert any(abs(value - results["after"]["eval_min_reward"]) < 1e-5 for value in found)


@pytest.mark.slow
def test_the_built_in_pairs(tmp_path, monkeypatch):
    asked = []

    def few(n, *, of=demo.preferences, **given):
        asked.append((n, given.get("split", "train")))
        return of(min(n, 24), **given)

    monkeypatch.setattr(demo, "preferences", few)
    results = main(
        arguments(tmp_path, tmp_path / "run", "--model_name_or_path", "builtin", "--dataset_name", "builtin")
    )
    assert asked == [(16_000, "train"), (500, "test")]
    assert results["after"]["eval_num_pairs"] == results["num_pairs"] == 24


@pytest.mark.parametrize(
    ("more", "error", "words"),
    [
        (("--max_lenght", "8"), ConfigError, "unknown option --max_lenght; did you mean '--max_length'"),
        (("--dataset_name", "nowhere.json"), FileFormatError, "no such file: nowhere.json"),
        (("--eval_share", "0"), ConfigError, "eval_share is 0"),
        (("--load_in_4bit", "true"), ConfigError, "load_in_4bit on a CPU"),
        (("--resume_from_checkpoint", "true"), ConfigError, "no checkpoint to resume from"),
        (("--max_length", "4"), DataError, "source 'pairs.json', row"),
    ],
)
def test_what_is_wrong_is_said_before_any_step(corpus, tmp_path, more, error, words):
    with pytest.raises(error, match=words):
        main(arguments(corpus, tmp_path / "run", *more))


@pytest.mark.long
@pytest.mark.distributed
def test_two_processes_report_what_one_reports(corpus, tmp_path):
    """Fifteen held-out pairs, four a batch: ranks that run out are given rows twice, which count once."""
    one = main(arguments(corpus, tmp_path / "one", "--learning_rate", "0"))
    words = arguments(corpus, tmp_path / "two", "--learning_rate", "0")
    run_two_processes("recipes/reward.py", words)
    two = json.loads((tmp_path / "two" / "results.json").read_text())
    timed = ("runtime", "per_second", "num_tokens", "preparation_time", "epoch")
    for key, value in one["before"].items():
        if not key.endswith(timed):
            assert two["before"][key] == pytest.approx(value, abs=1e-6), key
    assert two["before"]["eval_num_pairs"] == one["before"]["eval_num_pairs"] == 15  # not a multiple of a batch
