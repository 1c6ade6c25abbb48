"""The configuration of a mixture: weights as they are meant, and messages that name what is wrong."""

from __future__ import annotations

import pytest
from datasets import Dataset

from hf_objectives.errors import ConfigError
from hf_objectives.mixture.build import build_mixture
from hf_objectives.mixture.config import MixtureConfig, SourceConfig, StageConfig
from tests.support.mixtures import mixture, source, sources


def shares(made) -> dict[str, float]:
    return dict(zip(made.names, made.plan.weights.tolist(), strict=True))


def test_weights_are_relative_and_a_line_says_so(caplog):
    assert shares(mixture()) == pytest.approx({"a": 0.6, "b": 0.3, "c": 0.1})
    assert not caplog.text
    made = build_mixture({"sources": sources((3, 1, 0))})
    assert shares(made) == {"a": 0.75, "b": 0.25, "c": 0}
    assert made.notes == ["weights add to 4, normalised: a 75.00%, b 25.00%, c 0.00%"] and made.notes[0] in caplog.text


def test_a_line_about_many_sources_stays_a_line():
    many = build_mixture({"sources": {f"s{i}": {"dataset": source("c"), "weight": 1} for i in range(50)}})
    assert many.notes[0].endswith("s11 2.00% and 38 more")


def test_without_weights_each_source_has_its_size():
    made = build_mixture({"sources": {name: source(name) for name in "abc"}})
    tokens = {name: sum(map(len, source(name)["input_ids"])) for name in "abc"}
    assert shares(made) == pytest.approx({name: n / sum(tokens.values()) for name, n in tokens.items()})
    by_rows = build_mixture({"sources": {name: source(name) for name in "abc"}, "unit": "examples", "temperature": 2})
    roots = {name: n**0.5 for name, n in (("a", 40), ("b", 25), ("c", 7))}
    assert shares(by_rows) == pytest.approx({name: n / sum(roots.values()) for name, n in roots.items()})


def test_presets_are_bound_by_name(caplog):
    rows = {name: {"dataset": source("a")} for name in ("fineweb", "stack", "proofs")}
    made = build_mixture(
        {"sources": rows, "preset": "llama3", "bind": {"web": "fineweb", "code": "stack", "math": "proofs"}}
    )
    assert shares(made) == pytest.approx({"fineweb": 0.82 / 0.94, "stack": 0.08 / 0.94, "proofs": 0.04 / 0.94})
    assert "preset llama3: no source for books, other, whose share goes to the others" in caplog.text
    assert "weights add to 0.94, normalised" in caplog.text
    names = {name: source("a") for name in ("common_crawl", "books", "wikipedia", "github", "webtext")}
    assert shares(build_mixture({"sources": names, "preset": "gpt3"}))["common_crawl"] == pytest.approx(0.6 / 1.04)
    twice = {
        "sources": rows,
        "preset": "llama3",
        "bind": {"web": "fineweb", "code": "stack", "math": "stack", "books": "proofs"},
    }
    assert shares(build_mixture(twice))["stack"] == pytest.approx(0.12 / 0.97)


def test_a_yaml_file_a_mapping_and_python_say_the_same(tmp_path):
    data = tmp_path / "web.jsonl"
    data.write_text('{"text": "one"}\n{"text": "two"}\n')
    file = tmp_path / "mixture.yaml"
    file.write_text(
        f"sources:\n  web: {{path: {data}, weight: 2e-1, max_epochs: 3}}\n  code: {data}\nunit: examples\n".replace(
            f"code: {data}", f"code: {{path: {data}, weight: 0.8}}"
        )
        + "stages:\n  - {begin: 1e3, weights: {web: 1}}\n"
    )
    python = MixtureConfig(
        [SourceConfig("web", 0.2, str(data), max_epochs=3), SourceConfig("code", 0.8, str(data))],
        unit="examples",
        stages=[StageConfig(1_000, {"web": 1})],
    )
    made = [build_mixture(given) for given in (file, str(file), python)]
    assert len({str(one.state_dict(0)) for one in made}) == 1
    assert made[0].plan.stages[0].begin == 1_000 and made[0].feeds[0].max_epochs == 3


A = {"dataset": source("a"), "weight": 1}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"sources": {}}, "no sources; name at least one"),
        ({"sources": {"a": {**A, "weight": -1}}}, "source 'a': weight is -1.0; expected a number, 0 or more"),
        ({"sources": {"a": {**A, "weight": float("nan")}}}, "source 'a': weight is NaN; expected a number"),
        ({"sources": {"a": {**A, "weight": float("inf")}}}, "source 'a': weight is inf"),
        ({"sources": {"a": {**A, "weight": "much"}}}, "source 'a': weight is 'much'; expected a number"),
        (
            {"sources": {"a": {**A, "weight": 0}, "b": {**A, "weight": 0}}},
            "2 weights .a, b., none above 0; expected one at least",
        ),
        ({"sources": {"a": A, "b": {"dataset": source("b")}}}, "source 'b' has no weight, and others do"),
        ({"sources": {"a": {**A, "wieght": 1}}}, "source 'a': unknown key 'wieght' .did you mean 'weight'"),
        ({"sources": {"a": {"weight": 1}}}, "source 'a': give a path .or data_files. or a dataset, one of the two"),
        ({"sources": {"a": {**A, "max_epochs": 0}}}, "source 'a': max_epochs is 0.0; expected more than 0"),
        ({"sources": {"a": {**A, "format": "massages"}}}, "format is 'massages'; expected .*did you mean 'messages'?"),
        ({"sources": {"a": {**A, "eval_share": 1}}}, "source 'a': eval_share is 1.0; expected 0 or more, under 1"),
        ({"sources": [A]}, "source 0: missing 1 required positional argument: 'name'"),
        ({"sources": [{"name": "a", **A}, {"name": "a", **A}]}, "two sources are named 'a'"),
        ({"sources": {"a": A}, "unit": "token"}, "unit is 'token'; expected one of tokens.*did you mean 'tokens'?"),
        (
            {"sources": {"a": A}, "preset": "llama"},
            "preset is 'llama'; expected one of gpt3, llama3; did you mean 'llama3'?",
        ),
        ({"sources": {"a": A}, "packing": "both"}, "packing is 'both'; expected one of within, across"),
        ({"sources": {"a": A}, "packing": "within"}, "packing needs max_length"),
        (
            {"sources": {"a": A}, "packing": "across", "max_length": 9, "unit": "rows"},
            "unit 'rows' with packing across",
        ),
        ({"sources": {"a": A}, "temperature": 0}, "temperature is 0.0; expected more than 0"),
        ({"sources": {"a": A}, "blocklist": {"b": [1]}}, "the sources of the blocklist: unknown key 'b'; expected a"),
        (
            {"sources": {"a": A}, "blocklist": {"a": ["x"]}},
            "blocklist of source 'a' has .'x'.; expected a list of row numbers",
        ),
        (
            {"sources": {"a": A}, "blocklist": {"a": list(range(40))}},
            "source 'a': the blocklist leaves none of its 40 rows",
        ),
        (
            {"sources": {"a": A}, "stages": [{"begin": 5, "weights": {"c": 1}}]},
            "the sources of stage 0: unknown key 'c'; expected a",
        ),
        (
            {"sources": {"a": A}, "stages": [{"begin": 5, "weights": {"a": -1}}]},
            "stage 0: weight 'a' is -1.0; expected a number, 0 or more",
        ),
        ({"sources": {"a": A}, "stages": [{"begin": 5, "weights": {}}]}, "stage 0: 1 weights .a., none above 0"),
        ({"sources": {"a": A}, "stages": [{"begin": "soon", "weights": {"a": 1}}]}, "stage 0: begin is 'soon'"),
        ({"sources": {"a": A}, "stages": [{"start": 5}]}, "stage: unknown key 'start'"),
        ({"sources": {"a": A}, "sorces": 1}, "mixture: unknown key 'sorces' .did you mean 'sources'"),
        ({"sources": {"a": A}, "preset": "gpt3"}, "source 'a' has a weight, and preset 'gpt3' gives one"),
        ({"sources": None}, "sources is None; expected a mapping of names to sources"),
        ({"sources": {"a": {"path": 5}}}, "source 'a': path is 5; expected a path"),
        ({"sources": {1: {**A, "weight": 0}}}, "1 weights .1., none above 0"),
        ({"sources": {"a": {**A, "max_epochs": float("inf")}}}, "source 'a': max_epochs is inf; expected a number"),
        ({"sources": {"a": {**A, "eval_share": "x"}}}, "source 'a': eval_share is 'x'; expected a number"),
        ({"sources": {"a": A}, "bind": ["web"]}, "bind is list; expected a mapping"),
        ({"sources": {"a": A}, "stages": [{"begin": float("inf"), "weights": {"a": 1}}]}, "stage 0: begin is inf"),
        ("nowhere.yaml", "cannot read nowhere.yaml: No such file"),
        ({"sources": {"a": 5}}, "source 'a': the dataset is int; expected a dataset or rows"),
        ({"sources": {"a": A}, "temperature": "hot"}, "temperature is 'hot'; expected a number"),
        ({"sources": {"a": A}, "buffer_size": "x"}, "buffer_size is 'x'; expected a number"),
        ({"sources": {"a": "nobody/nothing"}}, "source 'a' cannot be read: .*nobody/nothing"),
        (
            {"sources": {"a": Dataset.from_dict({"input_ids": ["x y"]})}},
            "source 'a': input_ids are string; expected lists of token ids",
        ),
    ],
)
def test_what_cannot_work_is_named(config, words):
    with pytest.raises(ConfigError, match=words):
        build_mixture(config)


@pytest.mark.parametrize(
    ("bind", "words"),
    [
        (
            {"web": "fine"},
            "the source that part 'web' is bound to is 'fine'; expected one of fineweb, stack; did you mean 'fineweb'?",
        ),
        ({"wab": "fineweb"}, "the parts of preset 'llama3': unknown key 'wab' .did you mean 'web'"),
        ({"web": "fineweb"}, "source 'stack' stands for no part of preset 'llama3'; bind it to one, or take it out"),
        (None, "the parts of preset 'llama3': unknown key 'fineweb'"),
    ],
)
def test_a_preset_that_is_bound_wrongly_is_named(bind, words):
    rows = {name: {"dataset": source("a")} for name in ("fineweb", "stack")}
    with pytest.raises(ConfigError, match=words):
        build_mixture({"sources": rows, "preset": "llama3", "bind": bind})


def test_an_argument_is_never_taken_for_another():
    first = [{"a": [{"text": "a"}]}, "examples", None, None, 2.0, (), None]
    assert MixtureConfig(*first).temperature == 2
    with pytest.raises(TypeError, match="positional arguments"):
        MixtureConfig(*first, "concat")
