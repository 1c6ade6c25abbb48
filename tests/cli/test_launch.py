"""A recipe by its name: options of the launcher are told from those of the recipe, in words and in the YAML."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import accelerate.commands.launch
import pytest
import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from hf_objectives.cli.launch import run_recipe
from hf_objectives.cli.main import main
from hf_objectives.errors import ConfigError
from hf_objectives.recipes import LAUNCH_CONFIGS, sft

HERE = "hf_objectives.recipes"


@pytest.fixture
def started(monkeypatch):
    """What would be started: the launcher's arguments, or the words of a recipe in this process; one device, no config."""
    found = SimpleNamespace(launch=None, here=None)
    monkeypatch.setattr(accelerate.commands.launch, "launch_command", lambda args: setattr(found, "launch", args))
    monkeypatch.setattr(sft, "main", lambda words: setattr(found, "here", words))
    monkeypatch.setattr("accelerate.commands.config.config_args.default_config_file", "nowhere")
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    monkeypatch.setenv("HF_OBJECTIVES_LAUNCH_KEYS", "")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return found


def test_without_the_launchers_options_it_runs_here(started):
    words = [
        "--config",
        "quickstart",
        "--max_steps",
        "2",
        "--gradient_accumulation_steps=2",
        "--debug",
        "underflow_overflow",
    ]
    assert run_recipe("sft", words) is None
    assert started.here == words and started.launch is None


@pytest.mark.parametrize("why", ["devices", "config"])
def test_several_devices_or_a_config_of_accelerate_start_a_launch(started, monkeypatch, tmp_path, why):
    if why == "devices":
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    else:
        (tmp_path / "default.yaml").write_text("")
        monkeypatch.setattr(
            "accelerate.commands.config.config_args.default_config_file", str(tmp_path / "default.yaml")
        )
    run_recipe("sft", ["--max_steps", "2"])
    assert started.here is None and started.launch.num_processes is None
    monkeypatch.setenv("LOCAL_RANK", "0")  # a launch does not start another
    run_recipe("sft", ["--max_steps", "2"])
    assert started.here == ["--max_steps", "2"]


def test_options_of_the_launcher(started):
    words = ["--num-processes", "4", "--config", "quickstart", "--gradient_accumulation_steps", "2", "--same_network"]
    run_recipe("sft", [*words, "--seed=3", "--config_file", "fsdp2"])
    args = started.launch
    assert (args.num_processes, args.same_network, args.config_file) == (4, True, str(LAUNCH_CONFIGS / "fsdp2.yaml"))
    assert args.gradient_accumulation_steps is None  # the recipe's
    rest = ["--config", "quickstart", "--gradient_accumulation_steps", "2", "--seed=3"]
    assert (args.module, args.training_script, args.training_script_args) == (True, HERE, ["sft", *rest])


def test_the_yaml_may_hold_the_launchers_keys(started, tmp_path):
    path = tmp_path / "trl.yaml"
    keys = ["accelerate_config: zero3", "num_processes: 2", "mixed_precision: no", "quiet: true", "use_cpu: true"]
    path.write_text("\n".join([*keys, "same_network: false", "seed: 3", ""]))
    run_recipe("sft", ["--config", str(path), "--num_processes", "8"])
    args = started.launch
    assert (args.num_processes, args.quiet, args.same_network, args.multi_gpu) == (8, True, False, False)
    assert args.config_file == str(LAUNCH_CONFIGS / "zero3.yaml") and args.mixed_precision == "no"
    assert args.training_script_args == ["sft", "--config", str(path)]


@pytest.mark.parametrize(("file", "expected"), [(None, True), ("cpu", True), ("fsdp2", False)])
def test_several_processes_on_cpus(started, monkeypatch, file, expected):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    run_recipe("sft", ["--num_processes", "2", *(["--config_file", file] if file else [])])
    assert bool(started.launch.multi_gpu) is expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config_file", "fsdp3"], "no such file; shipped are cpu, .*; did you mean 'fsdp2'"),
        (["--num_processes", "many"], "accelerate launch: argument --num_processes.*invalid int value"),
        (["--config", "quikstart"], "did you mean 'quickstart'"),
    ],
)
def test_what_cannot_be_is_refused(started, words, message):
    with pytest.raises(ConfigError, match=message):
        run_recipe("sft", words)
    assert started.launch is None and started.here is None


def test_a_launched_process_takes_no_options_of_the_launcher(started, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ConfigError, match="num_processes is for accelerate launch, which started this process"):
        run_recipe("sft", ["--num_processes", "2"])


def test_the_exit_code_of_a_launch_is_that_of_the_recipe(started, monkeypatch):
    def fail(args):
        raise subprocess.CalledProcessError(3, "recipe")

    monkeypatch.setattr(accelerate.commands.launch, "launch_command", fail)
    with pytest.raises(SystemExit) as ended:
        main(["sft", "--num_processes", "1"])
    assert ended.value.code == 3


def test_of_several_processes_it_is_that_of_the_first_that_failed(started, monkeypatch):
    def fail(args):
        failures = {rank: ProcessFailure(rank, 1, code, "none") for rank, code in ((0, 2), (1, -15))}
        failures[0].timestamp, failures[1].timestamp = 1, 2
        raise ChildFailedError("recipe", failures)

    monkeypatch.setattr(accelerate.commands.launch, "launch_command", fail)
    assert run_recipe("sft", ["--num_processes", "2"]) == 2


@pytest.mark.long
def test_two_processes_by_one_command(tmp_path):
    yaml = f"""
model_name_or_path: builtin
dataset_name: builtin
built_in_rows: 50
max_length: 128
max_steps: 2
use_cpu: true
eval_strategy: "no"
save_strategy: "no"
output_dir: {tmp_path / "out"}
num_processes: 2
mixed_precision: "no"
"""
    (tmp_path / "mine.yaml").write_text(yaml)
    command = [sys.executable, "-m", "hf_objectives", "sft", "--config", str(tmp_path / "mine.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "out" / "environment.json").read_text())["world_size"] == 2
    assert (tmp_path / "out" / "model.safetensors").exists()
