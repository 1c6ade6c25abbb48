"""The plan: figures by hand, and launches that are refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from rich.console import Console
from test_causal_lm import arguments
from test_collators import llama

from hf_objectives.errors import ConfigError
from hf_objectives.plan import check_launch, print_plan, resolve_plan

DATA = SimpleNamespace(max_length=128, packing=True, strategy="best_fit", overlength="drop", train_on="assistant")


def test_plan_by_hand(tmp_path):
    args = arguments(
        tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=3, max_steps=-1, num_train_epochs=2
    )
    lines = resolve_plan(args, DATA, llama(), 100, {"max_length": "run.yaml", "num_train_epochs": "command line"})
    plan: dict[str, list[str]] = {}
    for line in lines:
        plan.setdefault(line.name, []).append(line.value)
    assert plan["global batch"] == ["12 rows = 4 per device x 3 accumulated x 1", "up to 1,536 tokens"]
    assert plan["steps"] == ["18 (100 rows, 9 steps an epoch)"]
    assert plan["processes"] == ["1 (no process group)"] and plan["device"] == ["cpu"] and plan["attention"] == ["sdpa"]
    origins = {line.name: line.origin for line in lines}
    assert origins["steps"] == "this launch, command line" and origins["row"].startswith("run.yaml")
    console = Console(record=True, width=120)
    print_plan(lines, console)
    assert "up to 1,536 tokens" in console.export_text()


def test_launches_that_would_not_do_what_they_say(tmp_path, monkeypatch):
    args = arguments(tmp_path)
    several = SimpleNamespace(n_gpu=4)
    monkeypatch.setattr("sys.argv", ["recipes/sft.py", "--config", "x.yaml"])
    with pytest.raises(ConfigError, match="accelerate launch --num_processes 4 recipes/sft.py --config x.yaml"):
        check_launch(several)
    args.fp16 = True
    with pytest.raises(ConfigError, match="fp16 on a CPU"):
        check_launch(args)
