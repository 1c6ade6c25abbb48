"""`--help` of the recipes and completion, from the table."""

from __future__ import annotations

import subprocess

import pytest

from hf_objectives.cli.main import SHELLS, main
from hf_objectives.cli.recipe_options import read_table, recipe_keys


@pytest.mark.parametrize("recipe", read_table()["recipes"])
def test_help_shows_every_option(recipe, capsys):
    main([recipe.replace("_", "-"), "--help"])
    said = capsys.readouterr().out
    assert said.startswith(f"usage: hf-objectives {recipe.replace('_', '-')} ")
    assert all(f"--{key} " in said for key in recipe_keys(recipe)) and "--print_config" in said


@pytest.mark.parametrize("shell", SHELLS)
def test_completion_knows_commands_and_options(shell, capsys, tmp_path):
    main(["completion", shell])
    script = capsys.readouterr().out
    assert all(word in script for word in ("mixture-search", "lora_r", "diagnose", "fail_on"))
    if shell == "bash":
        (tmp_path / "script").write_text(script)
        subprocess.run(["bash", "-n", tmp_path / "script"], check=True)
        complete = f"source {tmp_path}/script; COMP_WORDS=(hf-objectives sft --lora_a); COMP_CWORD=2; "
        complete += "COMP_LINE='hf-objectives sft --lora_a'; _shtab_hf_objectives; echo ${COMPREPLY[@]}"
        done = subprocess.run(["bash", "-c", complete], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "--lora_alpha"


def test_completion_of_another_shell_is_refused(refused):
    with refused("completion: expected one of bash, zsh, tcsh"):
        main(["completion", "fish"])
