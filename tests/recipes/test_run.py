"""The course of every recipe: resuming, errors as one line, and a push that cannot lose a run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from hf_objectives.errors import ConfigError, PushError
from hf_objectives.recipes import distill, dpo, mixture_search, ppo, pretrain, reward, sft, stack
from hf_objectives.recipes.run import resume_point, run_program
from tests.support.recipes import few_built_in

ROOT = Path(__file__).parents[2]
PROGRAMS = {"distill": distill, "dpo": dpo, "mixture_search": mixture_search, "ppo": ppo, "pretrain": pretrain,
            "reward": reward, "sft": sft, "stack": stack}  # fmt: skip


def test_the_checkpoint_to_go_on_from(tmp_path):
    def point(asked):
        return resume_point(SimpleNamespace(resume_from_checkpoint=asked, output_dir=str(tmp_path)))

    assert [point(asked) for asked in (None, "", "false", "False", False)] == [None] * 5
    with pytest.raises(ConfigError, match="runs/a/checkpoint-3 is no checkpoint to resume from: no such folder"):
        point("runs/a/checkpoint-3")
    with pytest.raises(ConfigError, match="no checkpoint to resume from"):
        point("true")
    for step in (2, 10, 12):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            torch.save({}, folder / name)
        save_file({"weight": torch.ones(1)}, folder / "model.safetensors")
    with pytest.raises(
        ConfigError, match=r"checkpoint-12 \(it has no trainer_state.json.*checkpoint-10.*checkpoint-2 "
    ):
        point("true")
    for step in (2, 10):  # the run was killed while it wrote the third
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-12" / "trainer_state.json").write_text('{"global_step')
    assert point(str(tmp_path / "checkpoint-2")) == str(tmp_path / "checkpoint-2")
    assert [point(asked) for asked in ("true", "True", True)] == [str(tmp_path / "checkpoint-10")] * 3


def test_every_program_calls_its_recipe():
    assert {path.stem for path in (ROOT / "recipes").glob("*.py")} == set(PROGRAMS)
    for name in PROGRAMS:
        source = (ROOT / "recipes" / f"{name}.py").read_text()
        assert f"from hf_objectives.recipes.{name} import main\n" in source and "    run_program(main)\n" in source


def test_an_error_of_ours_is_a_line_and_others_keep_their_trace(capsys):
    def fails(error):
        raise error

    with pytest.raises(SystemExit, match="^2$"):
        run_program(lambda: fails(ConfigError("words")))
    assert capsys.readouterr().err == "ConfigError: words\n"
    with pytest.raises(ZeroDivisionError):
        run_program(lambda: fails(ZeroDivisionError()))


@pytest.mark.slow
def test_a_program_ends_with_the_line(tmp_path):
    command = [sys.executable, str(ROOT / "recipes" / "ppo.py"), "--output_dir", str(tmp_path), "--use_cpu", "true"]
    ran = subprocess.run([*command, "--bf16", "false"], capture_output=True, text=True)
    assert ran.returncode == 2 and "Traceback" not in ran.stderr
    assert ran.stderr.strip().splitlines()[-1].startswith("ConfigError: model_name_or_path is missing")


@pytest.mark.slow
def test_the_course_as_a_whole(tmp_path, monkeypatch, capsys):
    """The course as a whole on a few built-in chats; what every recipe leaves in its folder, and prints."""
    few_built_in(monkeypatch, 40)
    words = "--model_name_or_path builtin --dataset_name builtin --max_steps 1 --use_cpu true --report_to none"
    with pytest.raises(PushError, match="no repository 'org/name' to push to .*OfflineModeIsEnabled"):
        sft.main([*words.split(), "--push_to_hub", "true", "--hub_model_id", "org/name", "--output_dir", str(tmp_path)])
    assert "packed" not in capsys.readouterr().out and not [*tmp_path.iterdir()]  # before anything is loaded
    adapter = ["--push_to_hub", "true", "--use_peft", "true", "--output_dir", str(tmp_path)]
    with pytest.raises(ConfigError, match="the adapter's base model is 'builtin', which nobody else can load"):
        sft.main([*words.split(), *adapter])
    results = sft.main([*words.split(), "--output_dir", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "exact match" in printed and "(wrong, it is" in printed
    assert set(results) >= {"before", "after", "ledger"} and "eval_exact_match" in results["before"]
    written = {path.name for path in tmp_path.iterdir()}
    assert {"model.safetensors", "trainer_state.json", "environment.json", "labels.json", "README.md"} <= written
    assert "from `builtin`" in (tmp_path / "README.md").read_text()
