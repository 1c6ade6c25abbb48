"""One YAML, overridden by the command line, and where each value came from."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

import pytest

from hf_objectives.errors import ConfigError
from hf_objectives.recipes import dpo, mixture_search, ppo, pretrain, reward, sft
from hf_objectives.recipes.arguments import parse_config
from hf_objectives.trainers import PerplexityTrainingArguments


class Kind(Enum):
    NO, STEPS = "no", "steps"


@dataclass
class Data:
    max_length: int = 16
    sources: str | None = None
    packing: bool = True
    names: list[str] = field(default_factory=list)
    rate: float = 0.1
    label: str | None = None
    kind: Kind = Kind.STEPS


def parse(tmp_path, yaml, *argv, classes=(Data,)):
    path = tmp_path / "run.yaml"
    path.write_text(yaml)
    return parse_config(classes, ["--config", str(path), *argv])


def test_command_line_over_yaml_over_default(tmp_path):
    (data,), origin = parse(tmp_path, "max_length: 8\npacking: false\n", "--max_length", "32")
    assert (data.max_length, data.packing, data.sources) == (32, False, None)
    given = {name: source for name, source in origin.items() if source != "default"}
    assert given == {"max_length": "command line", "packing": "run.yaml"} and origin["sources"] == "default"


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
        ("# two lines\nmax_lenght: 8\n", [], r"run.yaml, line 2: unknown key 'max_lenght'; did you mean 'max_length'"),
        ("max_length: 8\n", ["--packin", "true"], "unknown option --packin; did you mean '--packing'"),
        ("max_length: 8\n", ["--max_length", "many"], "--max_length.*: invalid int value: 'many'"),
        ("max_length: 8\n", ["stray"], "unexpected argument 'stray'"),
        ("a: [\n", [], "is not valid YAML"),
        ("- 1\n", [], "holds list; expected keys and values"),
        ("\nmax_length: many\n", [], r"run.yaml, line 2: max_length is 'many'; expected int"),
        ("max_length: 1.5\n", [], r"line 1: max_length is 1.5; expected int"),
        ("max_length: true\n", [], r"line 1: max_length is True; expected int"),
        ("max_length: null\n", [], r"line 1: max_length is None; expected int"),
        ("max_length: [1]\n", [], r"line 1: max_length is \[1\]; expected int"),
        ("max_length: {a: 1}\n", [], r"line 1: max_length is {'a': 1}; expected int"),
        ("packing: true\n\npacking: false\n", [], "line 3: packing stands on line 1 already"),
        ("packing: 7\n", [], r"line 1: packing is 7; expected bool"),
        ("kind: worst\n", [], r"line 1: kind is 'worst'; expected one of no, steps"),
    ],
)
def test_bad_configs_are_named(tmp_path, yaml, argv, words):
    with pytest.raises(ConfigError, match=words):
        parse(tmp_path, yaml, *argv)


def test_all_that_is_wrong_comes_in_one_message(tmp_path):
    with pytest.raises(ConfigError) as error:
        parse(tmp_path, "max_lenght: 8\npacking: 7\nname: x\n", "--sorces", "a")
    assert all(
        word in str(error.value) for word in ("--sorces", "line 1", "line 2: packing", "line 3: unknown key 'name'")
    )


@pytest.mark.parametrize(
    ("yaml", "name", "value"),
    [
        ("kind: no\n", "kind", "no"),  # YAML reads false
        ("label: 2024\n", "label", "2024"),
        ("label: true\n", "label", "true"),
        ("sources: null\n", "sources", None),
        ("rate: 1\n", "rate", 1),
        ("rate: 1e-4\n", "rate", 1e-4),  # YAML reads text
        ("names: one\n", "names", ["one"]),
        ("packing: 'no'\n", "packing", False),
    ],
)
def test_values_that_yaml_reads_otherwise(tmp_path, yaml, name, value):
    (data,), _ = parse(tmp_path, yaml)
    assert getattr(data, name) == value and type(getattr(data, name)) is type(value)


def test_print_config_gives_the_run_again(tmp_path, capsys):
    yaml = "max_length: 8\nsources: {a: x.json}\nrate: 1e-4\n"
    with pytest.raises(SystemExit) as ended:
        parse(tmp_path, yaml, "--print_config", "--packing", "false", "--max_length", "32")
    assert not ended.value.code
    (again,), _ = parse(tmp_path, printed := capsys.readouterr().out)
    (data,), _ = parse(tmp_path, yaml, "--packing", "false", "--max_length", "32")
    assert again == data and len(printed.splitlines()) == 5


def test_a_missing_config_is_named(tmp_path):
    with pytest.raises(ConfigError, match="cannot read the config"):
        parse_config((Data,), ["--config", str(tmp_path / "none.yaml")])
    with pytest.raises(ConfigError, match="--config needs"):
        parse_config((Data,), ["--config"])
