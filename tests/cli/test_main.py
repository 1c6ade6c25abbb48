"""The command line, as a user types it: commands, help and errors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hf_objectives import __version__
from hf_objectives.cli.main import main
from hf_objectives.cli.options import COMMANDS
from hf_objectives.cli.recipe_options import read_table

RECIPES = [*read_table()["recipes"]]
HEAVY = ("torch", "transformers", "datasets", "matplotlib", "pandas", "trl", "accelerate")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["prepair"],
            "ConfigError: unknown command 'prepair'; expected one of prepare, mixture, .*; did you mean 'prepare'?",
        ),
        (["prepare"], "ConfigError: tokenizer is missing"),
        (["prepare", "--tokenizer", "x"], "ConfigError: output_dir is missing"),
        (["prepare", "--max_lenght", "3"], "did you mean '--max_length'?"),
        (["prepare", "--config", "none.yaml"], "cannot read the config none.yaml"),
        (["distil"], "did you mean 'distill'?"),
        (["distill", "--use_cpu", "true", "--bf16", "false"], "ConfigError: teacher_model_name_or_path is missing"),
        (["distill", "--lambda", "0.5"], "unknown option --lambda"),
    ],
)
def test_errors_are_one_line(words, message, refused):
    with refused(message.replace("?", r"\?")):
        main(words)


def test_help(capsys):
    main([])
    said = capsys.readouterr().out
    assert all(f"    {name.replace('_', '-')}" in said for name in (*COMMANDS, *RECIPES, "completion"))
    main(["--version"])
    assert capsys.readouterr().out == f"hf-objectives {__version__}\n"


def test_every_recipe_is_a_command():
    programs = {path.stem for path in (Path(__file__).parents[2] / "recipes").glob("*.py")}
    assert programs == {*RECIPES}


def test_help_imports_nothing_heavy():
    """Every help in one process; what it has imported at the end."""
    program = f"""
import contextlib, sys
from hf_objectives.cli import main
for words in (["--help"], *([command, "--help"] for command in {[*COMMANDS, *RECIPES]})):
    with contextlib.suppress(SystemExit):
        main(words)
print("heavy:", [name for name in {HEAVY} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "heavy: []", done.stdout[-500:] + done.stderr
    assert all(f"usage: hf-objectives {command} " in done.stdout for command in COMMANDS)
    assert all(f"usage: hf-objectives {name.replace('_', '-')} " in done.stdout for name in RECIPES)


def test_the_package_is_a_program():
    done = subprocess.run([sys.executable, "-m", "hf_objectives", "inspct"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert "unknown command 'inspct'" in done.stderr and "did you mean 'inspect'?" in done.stderr


def test_an_error_of_several_lines_is_one_line(monkeypatch, capsys):
    def fail(words):
        raise OSError("not found.\nCheck the connection")

    monkeypatch.setattr(sys.modules[main.__module__], "run_command", fail)
    with pytest.raises(SystemExit) as ended:
        main(["plot", "x"])
    assert ended.value.code == 2 and capsys.readouterr().err == "OSError: not found. Check the connection\n"
