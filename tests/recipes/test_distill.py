"""The recipe of distillation: from files to a student, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from hf_objectives import demo
from hf_objectives.errors import ConfigError, DataError
from hf_objectives.recipes.distill import main
from tests.support.recipes import QUIET, command_line, few_built_in, save_small_model, write_rows


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """A user's folder: a student, a larger teacher, an adapter of it, and chats in a file."""
    folder = tmp_path_factory.mktemp("user")
    _, tokenizer = save_small_model(folder)
    teacher = demo.build_model(tokenizer, hidden_size=64, num_layers=2, seed=1)
    for name in ("teacher", "adapter"):
        tokenizer.save_pretrained(folder / name)
    teacher.save_pretrained(folder / "teacher")
    teacher = AutoModelForCausalLM.from_pretrained(folder / "teacher")
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(teacher, lora).save_pretrained(folder / "adapter")
    write_rows(folder / "chats.jsonl", [row for row in demo.chats(60) if "tools" not in row])
    return folder


def arguments(corpus: Path, out: Path, *more: str) -> list[str]:
    given = {
        **QUIET,
        "model_name_or_path": corpus / "model",
        "teacher_model_name_or_path": corpus / "teacher",
        "output_dir": out,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 8,
        "max_completion_length": 6,
        "max_steps": 2,
        "learning_rate": "1e-3",
        "gradient_checkpointing": "false",
        "bf16": "false",
        "save_strategy": "no",
    }
    return command_line(given, *more)


@pytest.mark.slow
def test_from_a_file_to_a_student(corpus, tmp_path, capsys):
    watched = json.dumps({"texts": "builtin"})
    out = tmp_path / "run"
    dataset = [
        "--dataset_name",
        str(corpus / "chats.jsonl"),
        "--lm_datasets",
        watched,
        "--lmbda",
        "0.5",
        "--beta",
        "0.3",
    ]
    results = main(arguments(corpus, out, *dataset))
    log = json.loads((out / "trainer_state.json").read_text())["log_history"]
    assert [entry["on_policy"] in (0, 1) for entry in log if "loss" in entry] == [True, True]
    for name in ("perplexity", "teacher_perplexity", "divergence", "on_policy_divergence", "loss", "texts_perplexity"):
        assert f"eval_{name}" in results["before"] and f"eval_{name}" in results["after"], name
    assert "eval_exact_match" not in results["after"] and results["rows_left_out"] == {}
    written = {path.name for path in out.iterdir()}
    assert {"model.safetensors", "tokenizer.json", "training_curves.png", "results.json", "README.md"} <= written
    before = AutoModelForCausalLM.from_pretrained(corpus / "model").state_dict()
    after = AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    card = (out / "README.md").read_text()
    assert (
        "Trained on a teacher's distributions (distillation) from `model`, teacher `teacher`, with hf_objectives"
        in card
    )
    assert str(corpus) not in card and "- distill" in card and "lmbda: 0.5" in card
    printed = " ".join(capsys.readouterr().out.split())
    assert "divergence to the teacher" in printed and "50% of the steps on answers of the student" in printed


@pytest.mark.slow
def test_the_built_in_corpus_and_a_teacher_with_an_adapter(corpus, tmp_path, monkeypatch):
    """Right answers of both are counted, and the adapter is part of the teacher."""
    few_built_in(monkeypatch, 24)
    found = []
    for name in ("teacher", "adapter"):
        words = ["--teacher_model_name_or_path", str(corpus / name), "--max_steps", "1"]
        found.append(main(arguments(corpus, tmp_path / name, *words)))
    for results in found:
        assert {"eval_exact_match", "eval_teacher_exact_match", "eval_divergence"} <= results["after"].keys()
    first, second = (results["before"] for results in found)
    assert first["eval_perplexity"] == second["eval_perplexity"]
    assert first["eval_teacher_perplexity"] != second["eval_teacher_perplexity"]


@pytest.mark.slow
def test_settings_of_loading_the_teacher_are_trls(corpus, tmp_path, monkeypatch):
    few_built_in(monkeypatch, 24)
    words = ["--teacher_model_init_kwargs", '{"dtype": "bfloat16"}', "--max_steps", "1", "--eval_share", "0.1"]
    seen = []

    class Noted(main.__self__):
        def evaluate(self, trainer):
            seen.append(trainer.teacher_model.dtype)
            return super().evaluate(trainer)

    Noted.run(arguments(corpus, tmp_path / "run", *words))
    assert set(seen) == {torch.bfloat16}


@pytest.mark.slow
def test_rows_that_cannot_be_used(corpus, tmp_path):
    rows = [{"messages": [{"role": "user", "content": "Hi"}]}, *[row for row in demo.chats(30) if "tools" not in row]]
    write_rows(tmp_path / "rows.jsonl", rows)
    words = ["--dataset_name", str(tmp_path / "rows.jsonl"), "--lmbda", "0.5", "--eval_share", "0"]
    with pytest.raises(DataError, match="rows.jsonl.*row 0.*the row is a prompt without an answer"):
        main(arguments(corpus, tmp_path / "run", *words))
    results = main(arguments(corpus, tmp_path / "run", *words, "--on_error", "skip"))
    assert list(results["rows_left_out"].values()) == [[0]] and results["num_rows"] == len(rows) - 1


@pytest.mark.slow
def test_a_teacher_is_needed(corpus, tmp_path, monkeypatch):
    few_built_in(monkeypatch, 24)
    with pytest.raises(ConfigError, match="teacher_model_name_or_path is missing"):
        main(arguments(corpus, tmp_path / "run", "--teacher_model_name_or_path", ""))
    with pytest.raises(ConfigError, match="gives the student's own logits"):
        main(arguments(corpus, tmp_path / "run", "--teacher_model_name_or_path", str(corpus / "model")))
