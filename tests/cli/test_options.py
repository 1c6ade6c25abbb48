"""Every command has one parser, made of a dataclass."""

from __future__ import annotations

import pytest

from hf_objectives.cli.options import parse
from hf_objectives.errors import ConfigError


def test_values_come_from_the_command_line_the_yaml_and_the_defaults(tmp_path):
    (tmp_path / "a.yaml").write_text("tokenizer: builtin\nrows: 7\npacking: true\nsources: {a: x.json}\n")
    given = parse("inspect", ["--config", str(tmp_path / "a.yaml"), "--rows", "9", "--max-length", "64"])
    assert (given.tokenizer, given.rows, given.max_length, given.packing) == ("builtin", 9, 64, True)
    assert given.sources == '{"a": "x.json"}' and given.train_on == "assistant" and given.template_kwargs == {}


def test_positional_arguments_and_flags():
    given = parse("diagnose", ["--json", "a", "b", "--fail_on", "error"])
    assert (given.log, given.json, given.fail_on) == (["a", "b"], True, "error")
    assert parse("report", ["a"]).output == "report.html"
    for words, expected in (([], False), (["--packing"], True), (["--packing", "no"], False)):
        assert parse("inspect", ["--tokenizer", "t", *words]).packing is expected


@pytest.mark.parametrize(
    ("command", "words", "message"),
    [
        ("plot", ["a", "--outptu", "x.png"], "unknown option --outptu; did you mean '--output'"),
        ("inspect", ["--tokenizer", "t", "stray"], "unexpected argument 'stray'"),
        ("inspect", ["--tokenizer", "t", "--train_on", "usr"], "train_on is 'usr'; expected one of"),
        ("mixture", ["--mixture", "a", "--tokens", "0"], "tokens 0.0; expected at least 1"),
        ("diagnose", ["a", "--fail_on", "worst"], "invalid choice: 'worst'"),
        ("inspect", ["--rows", "many"], "invalid int value: 'many'"),
        ("prepare", ["--overwrite", "perhaps"], "'perhaps' is neither true nor false"),
        ("plot", [], "required: run"),
    ],
)
def test_what_cannot_be_is_named(command, words, message):
    with pytest.raises(ConfigError, match=message):
        parse(command, words)
