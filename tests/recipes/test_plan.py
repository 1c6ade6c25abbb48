"""The plan: figures by hand, and launches that are refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from accelerate.state import DistributedType, PartialState
from rich.console import Console

from hf_objectives.errors import ConfigError
from hf_objectives.recipes.plan import check_launch, print_plan, resolve_plan
from tests.support.language_models import arguments, llama

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


def plan_of(args) -> dict[str, tuple[str, str]]:
    return {line.name: (line.value, line.origin) for line in resolve_plan(args, DATA, llama(), 100, {})}


def test_what_accelerate_adds_is_in_the_plan(tmp_path, monkeypatch):
    assert plan_of(arguments(tmp_path))["precision"] == ("float32", "this launch")
    assert plan_of(arguments(tmp_path, bf16=True))["precision"] == ("bf16 autocast of float32", "this launch")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert plan_of(arguments(tmp_path))["precision"] == ("bf16 autocast of float32", "accelerate's config")
    args = arguments(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setitem(PartialState._shared_state, "distributed_type", DistributedType.MULTI_GPU)
    assert plan_of(args)["processes"][0] == "1 (FSDP)"
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with pytest.raises(ConfigError, match="says 4 gradient accumulation steps, the training arguments 1"):
        check_launch(args)


def test_a_tracker_that_is_not_installed_is_told_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_objectives.recipes.plan.get_available_reporting_integrations", lambda: ["tensorboard"])
    check_launch(arguments(tmp_path, report_to="tensorboard"))
    with pytest.raises(ConfigError, match="report_to names 'wandb', which is not installed here.*tensorboard or none"):
        check_launch(arguments(tmp_path, report_to="wandb"))


def test_rows_without_a_limit_and_documents_that_see_each_other(tmp_path):
    args = arguments(tmp_path)
    unpacked = SimpleNamespace(packing=False, overlength="cut", max_length=None, train_on="all")
    lines = [line for line in resolve_plan(args, unpacked, llama(), 100, {}) if line.name in ("row", "global batch")]
    assert lines[0].value == "as long as it is, one row each, padded" and len(lines) == 2
    packed = SimpleNamespace(**vars(DATA), isolate_documents=False)
    row = next(line.value for line in resolve_plan(args, packed, llama(), 100, {}) if line.name == "row")
    assert row == "128 tokens, packed (best_fit), documents not isolated"


def test_an_epoch_and_a_half_is_rounded_up_as_the_trainer_does(tmp_path):
    args = arguments(tmp_path, per_device_train_batch_size=20, max_steps=-1, num_train_epochs=1.5)
    assert plan_of(args)["steps"][0] == "8 (100 rows, 5 steps an epoch)"


@pytest.mark.parametrize(("by", "message"), [("args", "--fsdp asks for FSDP"), ("env", "config asks for FSDP")])
def test_sharding_that_accelerate_would_leave_out_is_refused(tmp_path, monkeypatch, by, message):
    if by == "env":
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match=message):
        check_launch(arguments(tmp_path, fsdp=by == "args"))


def test_launches_that_would_not_do_what_they_say(tmp_path, monkeypatch):
    args = arguments(tmp_path)
    several = SimpleNamespace(n_gpu=4)
    monkeypatch.setattr("sys.argv", ["recipes/sft.py", "--config", "x.yaml"])
    with pytest.raises(ConfigError, match="accelerate launch --num_processes 4 recipes/sft.py --config x.yaml"):
        check_launch(several)
    args.fp16 = True
    with pytest.raises(ConfigError, match="fp16 on a CPU"):
        check_launch(args)
