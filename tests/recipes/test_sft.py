"""The fine-tuning recipe, from a user's own files to a saved model, and what it says when something is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_objectives import compute_perplexity, demo
from hf_objectives.errors import ConfigError, FileFormatError, NothingSupervisedError
from hf_objectives.recipes.data import prepare
from hf_objectives.recipes.data_arguments import DataArguments
from hf_objectives.recipes.sft import main
from tests.support.recipes import QUIET, command_line, run_two_processes, save_small_model, write_rows


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """A user's folder: a small model, conversations of two sources."""
    folder = tmp_path_factory.mktemp("user")
    save_small_model(folder)
    write_rows(folder / "chats.jsonl", demo.chats(80))
    alpaca = [{"instruction": q.question, "input": "", "output": q.answer} for q in demo.questions(60)]
    (folder / "alpaca.json").write_text(json.dumps(alpaca))
    return folder


def arguments(corpus: Path, out: Path, *more: str) -> list[str]:
    sources = {"chats": str(corpus / "chats.jsonl"), "alpaca": str(corpus / "alpaca.json")}
    given = {
        **QUIET,
        "model_name_or_path": corpus / "model",
        "sources": json.dumps(sources),
        "output_dir": out,
        "max_length": 256,
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "learning_rate": "1e-2",
    }
    return command_line(given, *more)


@pytest.mark.slow
def test_from_files_to_a_model(corpus, tmp_path, capsys):
    results = main(arguments(corpus, tmp_path / "run"))
    assert results["after"]["eval_perplexity"] < results["before"]["eval_perplexity"]
    for source in ("chats", "alpaca"):
        assert results["after"][f"eval_{source}_num_tokens"] > 0
    written = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"model.safetensors", "tokenizer.json", "training_curves.png", "results.json", "README.md"} <= written
    printed = capsys.readouterr().out
    for words in (
        "The plan",
        "global batch",
        "What is trained",
        "of the tokens are trained",
        "Held out",
        "command line",
    ):
        assert words in printed
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    assert compute_perplexity(reloaded, tokenizer, ["What is 2 plus 2? 4"]).num_tokens > 0


@pytest.mark.slow
def test_a_mixture_that_ends_before_its_first_log_keeps_its_results(corpus, tmp_path):
    sources = {"chats": {"path": str(corpus / "chats.jsonl"), "weight": 1}}
    more = ("--sources", json.dumps(sources), "--max_steps", "1", "--logging_steps", "25", "--save_strategy", "no")
    main(arguments(corpus, tmp_path / "run", *more))
    assert json.loads((tmp_path / "run" / "results.json").read_text())["mixture"]
    assert not (tmp_path / "run" / "mixture.png").exists()


@pytest.mark.slow
def test_resume_is_the_uninterrupted_run(corpus, tmp_path):
    saving = ("--save_strategy", "steps", "--save_steps", "2")
    main(arguments(corpus, tmp_path / "run", *saving))
    whole = torch.load(tmp_path / "run" / "checkpoint-4" / "optimizer.pt")
    first = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoint-4").iterdir():
        path.unlink()
    (tmp_path / "run" / "checkpoint-4").rmdir()
    main(arguments(corpus, tmp_path / "run", *saving, "--resume_from_checkpoint", "true"))
    second = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))
    assert whole is not None
    # A finished run is evaluated, without a step.
    finished = main(arguments(corpus, tmp_path / "run", *saving, "--resume_from_checkpoint", "true"))
    third = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), third.parameters(), strict=True))
    assert finished["after"]["eval_loss"] != finished["before"]["eval_loss"]


@pytest.mark.slow
def test_lora(corpus, tmp_path):
    more = ("--use_peft", "true", "--lora_target_modules", "all-linear", "--packing", "false")
    main(arguments(corpus, tmp_path / "run", *more))
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("more", "error", "words"),
    [
        (("--max_lenght", "8"), ConfigError, "unknown option --max_lenght; did you mean '--max_length'"),
        (("--max_length", "8"), NothingSupervisedError, "longer than max_length"),
        (("--resume_from_checkpoint", "true"), ConfigError, "no checkpoint to resume from"),
        (("--sources", '{"a": "nowhere.json"}'), FileFormatError, "no such file: nowhere.json"),
        (("--sources", "{"), ConfigError, "sources is not a mapping"),
        (("--dataset_name", "x.json"), ConfigError, "dataset_name or sources, one of the two"),
        (("--load_in_4bit", "true"), ConfigError, "load_in_4bit on a CPU"),
        (("--strategy", "bfd"), ConfigError, "expected one of best_fit, first_fit, concat"),
    ],
)
def test_what_is_wrong_is_said_before_any_step(corpus, tmp_path, more, error, words):
    with pytest.raises(error, match=words):
        main(arguments(corpus, tmp_path / "run", *more))


@pytest.mark.long
@pytest.mark.distributed
def test_two_processes_report_what_one_reports(corpus, tmp_path, monkeypatch):
    one = main(arguments(corpus, tmp_path / "one", "--learning_rate", "0"))
    words = arguments(corpus, tmp_path / "two", "--learning_rate", "0")
    done = run_two_processes("recipes/sft.py", words, torchrun=True)
    two = json.loads((tmp_path / "two" / "results.json").read_text())
    assert two["after"]["eval_loss"] == pytest.approx(one["before"]["eval_loss"], rel=1e-6)
    assert "2 (DDP over gloo)" in done.stdout
    # The rows were prepared once: in one folder, by the one process that held its lock.
    (folder,) = (tmp_path / "two" / "prepared").iterdir()
    assert (folder / "ready.json").exists() and two["ledger"] == one["ledger"]
    # A process of the next launch takes what is there.
    before = (folder / "ready.json").stat().st_mtime_ns
    monkeypatch.setenv("WORLD_SIZE", "2")
    data = DataArguments(sources=words[words.index("--sources") + 1], max_length=256)
    tokenizer = AutoTokenizer.from_pretrained(corpus / "model")
    found = prepare(data, tokenizer, seed=42, output_dir=str(tmp_path / "two"))
    assert found.ledger.to_dict() == one["ledger"]
    assert [path.stat().st_mtime_ns for path in folder.parent.rglob("ready.json")] == [before]


@pytest.mark.long
@pytest.mark.real_model
def test_a_real_model_learns(real_model_path, corpus, tmp_path):
    """SmolLM2 with LoRA on a few rows of the corpus."""
    more = ("--model_name_or_path", real_model_path, "--use_peft", "true", "--lora_target_modules", "all-linear")
    sizes = ("--max_steps", "3", "--max_length", "128", "--per_device_train_batch_size", "1", "--learning_rate", "2e-3")
    few = json.dumps({"alpaca": str(corpus / "alpaca.json")})
    results = main(arguments(corpus, tmp_path / "run", *more, *sizes, "--sources", few, "--dtype", "float32"))
    assert results["after"]["eval_perplexity"] < results["before"]["eval_perplexity"]


@pytest.mark.slow
def test_sources_with_weights_are_a_mixture(corpus, tmp_path, capsys):
    sources = {
        "chats": {"path": str(corpus / "chats.jsonl"), "weight": 0.2},
        "alpaca": {"path": str(corpus / "alpaca.json"), "weight": 0.8},
    }
    more = ("--sources", json.dumps(sources), "--mixture", json.dumps({"unit": "supervised"}), "--max_steps", "20")
    words = arguments(corpus, tmp_path / "run")
    words[words.index("--sources") : words.index("--sources") + 2] = []
    results = main([*words, *more])
    shares = {one["name"]: one["share"] for one in results["mixture"]["sources"]}
    assert shares == pytest.approx({"chats": 0.2, "alpaca": 0.8}, abs=0.03)
    assert "shares of supervised" in capsys.readouterr().out and (tmp_path / "run" / "mixture.png").exists()
    with pytest.raises(ConfigError, match="a mixture has no length; say how long with max_steps"):
        main([*words, *more[:-1], "-1"])
    with pytest.raises(ConfigError, match="source 'a' is {'weight': 1}; expected a path, or a mapping with path"):
        main([*words, "--sources", '{"a": {"weight": 1}}'])
