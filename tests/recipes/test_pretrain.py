"""The pretraining recipe from files to a model: from scratch and further, mapped and streamed, resumed, on two processes."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_objectives import demo
from hf_objectives.errors import ConfigError, FileFormatError, PreparedDataError
from hf_objectives.preparation.config import CorpusSettings
from hf_objectives.preparation.corpus import prepare_corpus
from hf_objectives.recipes import pretrain, sft
from tests.support.recipes import (
    QUIET,
    ROOT,
    TWO_PROCESSES,
    command_line,
    run_two_processes,
    save_small_model,
    write_rows,
)

TINY = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 2, "max_position_embeddings": 128}  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A tokenizer, a checkpoint and texts of two sources, as a user would have them."""
    folder = tmp_path_factory.mktemp("corpus")
    _, tokenizer = save_small_model(folder)
    write_rows(folder / "a.jsonl", demo.texts(300))
    (folder / "b.txt").write_text("\n\n".join(row["text"] for row in demo.texts(100, seed=1)))
    prepare_corpus(
        {"a": str(folder / "a.jsonl"), "b": str(folder / "b.txt")},
        tokenizer,
        folder / "prepared",
        CorpusSettings(max_length=64, eval_share=0.1, num_proc=1, shard_bytes=4_000),
    )
    return folder


def arguments(corpus: Path, out: Path, *more: str, data: tuple[str, ...] = ()) -> list[str]:
    given = {
        **QUIET,
        "output_dir": out,
        "max_length": 64,
        "per_device_train_batch_size": 4,
        "learning_rate": "1e-2",
    }
    data = data or ("--prepared", str(corpus / "prepared"))
    model = () if "--model_config" in more else ("--model_name_or_path", str(corpus / "model"))
    return command_line(given, *data, *model, *more)


def history(out: Path) -> list[dict]:
    return json.loads((out / "trainer_state.json").read_text())["log_history"]


@pytest.mark.slow
def test_raw_files_to_a_model_from_scratch(corpus, tmp_path, capsys):
    sources = {"a": str(corpus / "a.jsonl"), "b": {"path": str(corpus / "b.txt")}}
    results = pretrain.main(
        arguments(
            corpus,
            tmp_path / "run",
            *("--model_config", json.dumps(TINY), "--tokenizer_name", str(corpus / "model")),
            *("--max_tokens", "10000", "--lr_scheduler_type", "warmup_stable_decay", "--eval_share", "0.1"),
            data=("--sources", json.dumps(sources)),
        )
    )
    for name in ("eval_bits_per_byte", "eval_a_bits_per_byte", "eval_b_perplexity"):
        assert results["after"][name] < results["before"][name]
    logs = [log for log in history(tmp_path / "run") if "num_tokens_seen" in log]
    assert 10_000 <= logs[-1]["num_tokens_seen"] < 10_000 + 2 * 4 * 64
    # Steps from tokens, and a decay over the last fifth of them that ends at zero.
    steps, decay = len(logs), round(len(logs) * 0.2)
    for log in logs:
        into = max(0, log["step"] - 1 - (steps - decay))
        assert log["learning_rate"] == pytest.approx(1e-2 * 0.5 * (1 + math.cos(math.pi * into / decay)), abs=1e-9)
    printed = capsys.readouterr().out
    for words in ("max_tokens, command", "A packed row", "a: 300 rows", "bits per byte, b", "in 4 shards"):
        assert words in printed, words
    assert "Pretrained from scratch with hf_objectives" in (tmp_path / "run" / "README.md").read_text()


@pytest.mark.slow
def test_the_fine_tuning_recipe_starts_from_it(corpus, tmp_path):
    pretrain.main(arguments(corpus, tmp_path / "base", "--max_steps", "2"))
    write_rows(tmp_path / "chats.jsonl", demo.chats(40))
    results = sft.main(
        [
            *("--model_name_or_path", str(tmp_path / "base"), "--dataset_name", str(tmp_path / "chats.jsonl")),
            *("--output_dir", str(tmp_path / "sft"), "--max_length", "256", "--max_steps", "2", "--use_cpu", "true"),
            *("--report_to", "none", "--learning_rate", "1e-2"),
        ]
    )
    assert results["after"]["eval_perplexity"] < results["before"]["eval_perplexity"]


@pytest.mark.slow
@pytest.mark.parametrize("streaming", ["false", "true"])
def test_resume_is_the_uninterrupted_run(corpus, tmp_path, streaming):
    more = ("--max_steps", "6", "--save_strategy", "steps", "--save_steps", "3", "--streaming", streaming)
    pretrain.main(arguments(corpus, tmp_path / "run", *more))
    whole, first = history(tmp_path / "run"), AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    pretrain.main(arguments(corpus, tmp_path / "run", *more, "--resume_from_checkpoint", "true"))
    second = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))
    for name in ("loss", "num_tokens_seen", "num_supervised_tokens"):
        assert [log[name] for log in history(tmp_path / "run") if name in log] == [
            log[name] for log in whole if name in log
        ]


@pytest.mark.slow
def test_tokens_seen_are_those_of_the_rows(corpus, tmp_path):
    pretrain.main(arguments(corpus, tmp_path / "run", "--num_train_epochs", "1"))
    manifest = json.loads((corpus / "prepared" / "manifest.json").read_text())
    train = [shard for shard in manifest["shards"] if shard["split"] == "train"]
    last = [log for log in history(tmp_path / "run") if "num_tokens_seen" in log][-1]
    assert last["num_tokens_seen"] == sum(shard["tokens"] for shard in train)
    assert last["num_supervised_tokens"] == sum(shard["supervised"] for shard in train)
    # The default schedule falls in a line over the one epoch, to zero after the last step.
    assert last["learning_rate"] == pytest.approx(1e-2 / last["step"], abs=1e-9)


@pytest.mark.parametrize(
    ("more", "data", "error", "words"),
    [
        (("--max_tokens", "5", "--max_steps", "5"), (), ConfigError, "expected one of the two"),
        (("--streaming", "true"), (), ConfigError, "a stream has no length; say how long with max_tokens"),
        (("--max_length", "32"), (), PreparedDataError, "max_length: 64 there, 32 asked for"),
        (("--strategy", "concat"), (), PreparedDataError, "strategy: 'best_fit' there, 'concat' asked for"),
        (("--dataset_name", "x.jsonl"), (), ConfigError, "give prepared, or dataset_name or sources, not both"),
        ((), ("--dataset_name", "none.jsonl"), FileFormatError, "no such file: none.jsonl"),
        ((), ("--prepared", "nowhere"), PreparedDataError, "holds no manifest.json"),
        (("--decay_share", "0"), (), ConfigError, "decay_share is 0"),
    ],
)
def test_what_is_wrong_is_said_before_any_step(corpus, tmp_path, more, data, error, words):
    with pytest.raises(error, match=words):
        pretrain.main(arguments(corpus, tmp_path / "run", *more, data=data))


@pytest.mark.long
@pytest.mark.distributed
def test_two_processes_with_loader_workers_stream_the_rows_of_one(corpus, tmp_path):
    more = ("--max_steps", "4", "--streaming", "true", "--learning_rate", "1e-3")
    pretrain.main(arguments(corpus, tmp_path / "one", *more))
    words = arguments(corpus, tmp_path / "two", *more, "--dataloader_num_workers", "2")
    words[words.index("--per_device_train_batch_size") + 1] = "2"
    run_two_processes("recipes/pretrain.py", words)
    one, two = ([log for log in history(tmp_path / run) if "loss" in log] for run in ("one", "two"))
    assert [log["num_tokens_seen"] for log in two] == [log["num_tokens_seen"] for log in one]
    assert [log["loss"] for log in two] == pytest.approx([log["loss"] for log in one], rel=1e-5)


SLOW = """
import sys, time
from hf_objectives.preparation.work import Work
whole = Work.__call__
def slow(self, segment):
    print("PREPARING", flush=True)
    time.sleep(35)
    return whole(self, segment)
Work.__call__ = slow
from hf_objectives.recipes import pretrain
from hf_objectives.distributed import leave_group
try:
    pretrain.main(sys.argv[1:])
finally:
    leave_group()
"""


@pytest.mark.long
@pytest.mark.distributed
def test_two_processes_prepare_once_and_outlast_the_groups_timeout(corpus, tmp_path):
    """35 seconds of preparation under a group whose collectives time out after 30; a busy machine needs some of these
    between two collectives of the training itself. Three are enough for preparation alone: tests/preparation/test_lock.py."""
    (tmp_path / "slow.py").write_text(SLOW)
    raw = ("--sources", json.dumps({"a": str(corpus / "a.jsonl")}), "--eval_share", "0.1", "--num_proc", "1")
    more = ("--ddp_timeout", "30", "--max_steps", "3", "--streaming", "true")
    words = arguments(corpus, tmp_path / "run", *more, data=raw)
    done = run_two_processes(tmp_path / "slow.py", words)
    assert done.stdout.count("PREPARING") == 1
    seen = [log["num_tokens_seen"] for log in history(tmp_path / "run") if "num_tokens_seen" in log]
    assert 3 * 8 * 64 * 0.8 < seen[-1] <= 3 * 8 * 64


# -- mixtures ----------------------------------------------------------------------------------------------------

WEIGHTS = {"sources": {"a": {"weight": 0.25}, "b": {"weight": 0.75, "max_epochs": 40}}}


def mixed(corpus: Path, out: Path, *more: str) -> list[str]:
    return arguments(corpus, out, "--mixture", json.dumps(WEIGHTS), "--learning_rate", "1e-3", *more)


@pytest.mark.slow
def test_sources_with_weights_are_a_mixture(corpus, tmp_path, capsys):
    sources = {"a": {"path": str(corpus / "a.jsonl"), "weight": 1}, "b": {"path": str(corpus / "b.txt"), "weight": 3}}
    raw = ("--sources", json.dumps(sources), "--eval_share", "0.1")
    results = pretrain.main(arguments(corpus, tmp_path / "run", "--max_tokens", "12000", data=raw))
    shares = {one["name"]: one["share"] for one in results["mixture"]["sources"]}
    assert shares == pytest.approx({"a": 0.25, "b": 0.75}, abs=0.01)
    said = capsys.readouterr().out
    assert "The mixture after" in said and (tmp_path / "run" / "mixture.png").stat().st_size > 10_000
    card = (tmp_path / "run" / "README.md").read_text()
    assert "| source | asked, tokens | given | tokens | epochs |" in card and "| b | 75.00% | 7" in card
    last = [log for log in history(tmp_path / "run") if "loss" in log][-1]
    assert last["mixture/b/share"] == shares["b"] and last["num_tokens_seen"] == pytest.approx(12_000, rel=0.05)
    assert last["mixture/a/tokens"] + last["mixture/b/tokens"] == last["num_tokens_seen"]
    # Other weights prepare nothing again.
    shards = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "prepared" / "train").iterdir()}
    sources["b"]["weight"] = 1
    raw = ("--sources", json.dumps(sources), "--eval_share", "0.1")
    pretrain.main(arguments(corpus, tmp_path / "run", "--max_steps", "1", data=raw))
    assert shards == {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "prepared" / "train").iterdir()}


@pytest.mark.slow
def test_a_mixture_may_bring_its_own_sources(corpus, tmp_path):
    (tmp_path / "mixture.yaml").write_text(
        f"sources:\n  x: {{path: {corpus}/a.jsonl, weight: 1, eval_share: 0.1}}\n  y: {{path: {corpus}/b.txt, weight: 1}}\n"
    )
    alone = ("--mixture", str(tmp_path / "mixture.yaml"))
    results = pretrain.main(arguments(corpus, tmp_path / "run", "--max_steps", "3", data=alone))
    assert {one["name"] for one in results["mixture"]["sources"]} == {"x", "y"} and "eval_x_perplexity" in results[
        "after"
    ]


@pytest.mark.parametrize(
    ("mixture", "words"),
    [
        ({"sources": {"a": {"weight": 1}}}, "source 'b' has no weight, and others do"),
        ({"unit": "words"}, "unit is 'words'"),
        ({"preset": "llama3", "bind": {"web": "a"}}, "source 'b' stands for no part of preset 'llama3'"),
    ],
)
def test_a_mixture_that_cannot_be_is_said_before_any_step(corpus, tmp_path, mixture, words):
    with pytest.raises(ConfigError, match=words):
        pretrain.main(arguments(corpus, tmp_path / "run", "--max_steps", "1", "--mixture", json.dumps(mixture)))
    with pytest.raises(ConfigError, match="a stream has no length; say how long with max_tokens"):
        pretrain.main(arguments(corpus, tmp_path / "run", "--mixture", json.dumps(WEIGHTS)))


@pytest.mark.long
@pytest.mark.distributed
def test_a_run_that_is_killed_goes_on_with_the_rows_it_would_have_seen(corpus, tmp_path):
    """Two processes with two loader workers each, killed without warning; resumed on one process with other workers."""
    pretrain.main(mixed(corpus, tmp_path / "one", "--max_steps", "10"))
    words = mixed(corpus, tmp_path / "two", "--max_steps", "10", "--save_strategy", "steps", "--save_steps", "2",
                  "--save_total_limit", "2", "--dataloader_num_workers", "2")  # fmt: skip
    words[words.index("--per_device_train_batch_size") + 1] = "2"
    (tmp_path / "stops.py").write_text(STOPS_IN_STEP_6)
    running = subprocess.Popen(
        [*TWO_PROCESSES, str(tmp_path / "stops.py"), *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert any("IN STEP 6" in line for line in running.stdout), "the run ended early"
    # torchrun starts each rank in its own session. A rank that lives on would write and delete checkpoints.
    ranks = psutil.Process(running.pid).children(recursive=True)
    for process in (running, *ranks):
        process.kill()
    running.wait()
    psutil.wait_procs(ranks)
    resumed = ("--resume_from_checkpoint", "true", "--dataloader_num_workers", "3")
    pretrain.main(mixed(corpus, tmp_path / "two", "--max_steps", "10", *resumed))
    one, two = ([log for log in history(tmp_path / run) if "loss" in log] for run in ("one", "two"))
    assert [log["step"] for log in two] == [log["step"] for log in one] == list(range(1, 11))
    for key in ("num_tokens_seen", "mixture/a/tokens", "mixture/b/tokens", "mixture/a/examples"):
        assert [log[key] for log in two] == [log[key] for log in one]
    assert [log["loss"] for log in two] == pytest.approx([log["loss"] for log in one], rel=1e-4)


STOPS_IN_STEP_6 = """
import sys, time
from hf_objectives.trainers import PerplexityTrainer
whole = PerplexityTrainer.training_step
def stops(self, *given, **more):
    if self.state.global_step == 5:
        print("IN STEP 6", flush=True)
        time.sleep(600)
    return whole(self, *given, **more)
PerplexityTrainer.training_step = stops
from hf_objectives.recipes import pretrain
pretrain.main(sys.argv[1:])
"""
