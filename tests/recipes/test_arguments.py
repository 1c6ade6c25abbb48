"""One YAML, overridden by the command line, and where each value came from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from hf_objectives.errors import ConfigError
from hf_objectives.recipes import dpo, mixture_search, ppo, pretrain, reward, sft
from hf_objectives.recipes.arguments import find_config, parse_config
from hf_objectives.trainers import PerplexityTrainingArguments


@dataclass
class Data:
    max_length: int = 16
    sources: str | None = None
    packing: bool = True
    names: list[str] = field(default_factory=list)


def parse(tmp_path, yaml, *argv, classes=(Data,)):
    path = tmp_path / "run.yaml"
    path.write_text(yaml)
    return parse_config(classes, ["--config", str(path), *argv])


def test_command_line_over_yaml_over_default(tmp_path):
    (data,), origin = parse(tmp_path, "max_length: 8\npacking: false\n", "--max_length", "32")
    assert (data.max_length, data.packing, data.sources) == (32, False, None)
    assert origin == {"max_length": "command line", "packing": "run.yaml", "sources": "default", "names": "default"}


def test_values_of_yaml_are_typed(tmp_path):
    yaml = f"learning_rate: 1e-4\noutput_dir: {tmp_path}\nsources: {{a: x.json}}\nuse_cpu: true\nnames: [p, q]\n"
    (data, args), _ = parse(tmp_path, yaml, classes=(Data, PerplexityTrainingArguments))
    assert args.learning_rate == 1e-4 and args.use_cpu is True
    assert data.sources == '{"a": "x.json"}' and data.names == ["p", "q"]


@pytest.mark.parametrize("recipe", [pretrain, sft, reward, dpo, ppo, mixture_search])
def test_help_of_a_recipe_can_be_shown(recipe, capsys):
    with pytest.raises(SystemExit, match="0"):
        recipe.main(["--help"])
    assert "--output_dir" in capsys.readouterr().out


def test_without_a_config():
    (data,), origin = parse_config((Data,), ["--max_length=4", "--packing", "false"])
    assert (data.max_length, data.packing) == (4, False) and origin["max_length"] == "command line"


@pytest.mark.parametrize(
    ("yaml", "argv", "words"),
    [
        ("max_lenght: 8\n", [], "unknown key 'max_lenght'; did you mean 'max_length'"),
        ("max_length: 8\n", ["--packin", "true"], "unknown option --packin; did you mean '--packing'"),
        ("a: [\n", [], "is not valid YAML"),
        ("- 1\n", [], "holds list; expected keys and values"),
    ],
)
def test_bad_configs_are_named(tmp_path, yaml, argv, words):
    with pytest.raises(ConfigError, match=words):
        parse(tmp_path, yaml, *argv)


def test_a_missing_config_is_named(tmp_path):
    with pytest.raises(ConfigError, match="cannot read the config"):
        parse_config((Data,), ["--config", str(tmp_path / "none.yaml")])
    with pytest.raises(ConfigError, match="--config needs"):
        parse_config((Data,), ["--config"])


def test_a_config_is_a_file_or_a_shipped_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = find_config("quickstart")
    assert shipped.is_file() and shipped.name == "quickstart.yaml"
    Path("quickstart").mkdir()  # a folder is no config
    assert find_config("quickstart") == shipped
    Path("mine.yaml").write_text("seed: 1")
    assert find_config("mine.yaml") == Path("mine.yaml")
    with pytest.raises(ConfigError, match=r"no such file; shipped are .*; did you mean 'quickstart'"):
        find_config("quikstart")
