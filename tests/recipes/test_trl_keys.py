"""Every field of TRL's configs: taken over, answered or refused; and TRL's own YAMLs run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import yaml
from transformers import TrainingArguments
from trl import DPOConfig, ModelConfig, RewardConfig, ScriptArguments, SFTConfig
from trl.scripts.utils import DatasetConfig, DatasetMixtureConfig

from hf_objectives import demo
from hf_objectives.cli.recipe_options import recipe_keys
from hf_objectives.errors import ConfigError
from hf_objectives.preparation import Place
from hf_objectives.recipes import dpo, parse_config, reward, sft
from hf_objectives.recipes.data import set_tokens
from hf_objectives.recipes.data_arguments import DataArguments
from hf_objectives.recipes.trl_keys import RULES, translate
from tests.support.recipes import save_small_model

SCRIPTS = {"sft": SFTConfig, "dpo": DPOConfig, "reward": RewardConfig}
FIELDS = [
    (script, field.name)
    for script, config in SCRIPTS.items()
    for cls in (ScriptArguments, DatasetMixtureConfig, ModelConfig, config)
    for field in dataclasses.fields(cls)
]
DEFAULTS = {
    field.name: field.default if field.default is not dataclasses.MISSING else []
    for cls in (ScriptArguments, DatasetMixtureConfig, SFTConfig)
    for field in dataclasses.fields(cls)
}


@pytest.mark.parametrize(("script", "name"), FIELDS)
def test_every_field_is_known(script, name):
    """An option of ours with its name, or a rule. Those of the training are the very fields of the parent class."""
    assert name in recipe_keys(script) or name in RULES


@pytest.mark.parametrize("name", [name for name in RULES if name != "datasets"])
def test_the_default_of_a_field_is_never_refused(name):
    done = translate({name: DEFAULTS[name]}, recipe_keys("sft"))
    assert not done.refusals and (done.answers or done.values)


def test_fields_of_a_dataset_of_a_mixture():
    entry = {
        "path": "org/x",
        "name": "short",
        "data_dir": "d",
        "data_files": ["a.json"],
        "split": "test",
        "columns": ["text"],
    }
    assert {field.name for field in dataclasses.fields(DatasetConfig)} == {*entry, "fraction"}
    done = translate({"datasets": [entry, {"path": "org/x", "fraction": 0.5}]}, recipe_keys("sft"))
    expected = {
        "path": "org/x",
        "config": "short",
        "data_dir": "d",
        "data_files": ["a.json"],
        "split": "test",
        "columns": ["text"],
    }
    assert done.values == {"sources": {"x": expected, "x_1": {"path": "org/x", "fraction": 0.5}}}
    place = DataArguments(sources=json.dumps({"x": expected})).places()["x"]
    assert place == Place("org/x", "test", "short", None, ["a.json"], "d", None, ["text"])


@pytest.mark.parametrize(
    ("given", "values"),
    [
        ({"dataset_train_split": "train_sft"}, {"dataset_split": "train_sft"}),
        ({"assistant_only_loss": False}, {"train_on": "all"}),
        ({"assistant_only_loss": True}, {}),
        ({"completion_only_loss": False}, {"train_on": "all"}),
        ({"packing_strategy": "wrapped"}, {"strategy": "concat"}),
        ({"packing_strategy": "bfd"}, {"strategy": "best_fit"}),
        ({"dataset_num_proc": 4}, {"num_proc": 4}),
        ({"dataset_streaming": True}, {"streaming": True}),
        ({"streaming": True}, None),
        ({"dataset_text_field": "body"}, {"column_mapping": {"body": "text"}}),
        ({"truncation_mode": "keep_start"}, {"overlength": "cut"}),
        ({"test_split_size": 0.1}, {"eval_share": 0.1}),
        (
            {"model_init_kwargs": {"torch_dtype": "bfloat16", "revision": "v1"}},
            {"dtype": "bfloat16", "model_revision": "v1"},
        ),
        ({"loss_type": "nll", "pad_to_multiple_of": 8, "shuffle_dataset": True, "eval_packing": False}, {}),
        ({"learning_rate": 1e-5, "max_length": 512, "eos_token": "<|im_end|>"}, None),  # keys of ours stay
    ],
)
def test_values(given, values):
    done = translate(given, recipe_keys("sft"))
    assert done.values == (given if values is None else values) and not done.refusals
    own = [answer for answer in done.answers if "is not given" not in answer]
    assert len(own) == (0 if values is None else len(given))


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"loss_type": "dft"}, "the loss is the negative log-likelihood"),
        ({"padding_free": True}, "set packing: true"),
        ({"packing_strategy": "ffd"}, "expected one of bfd, bfd_split, wrapped"),
        ({"truncation_mode": "keep_end"}, "set overlength"),
        ({"test_split_size": 100}, "eval_share"),
        ({"model_init_kwargs": {"device_map": "auto"}}, "leave out device_map"),
        ({"model_init_kwargs": '{"dtype": "bfloat16"}'}, "here a model is loaded by dtype"),
        ({"router_aux_loss_coef": 0.01}, "set it in the model's config"),
        ({"dataset_kwargs": {"skip_prepare_dataset": True}}, "input_ids and labels are taken as they are"),
        ({"datasets": ["x.json"]}, "expected a list of mappings with path"),
        ({"datasets": [{"path": "x", "weight": 1}]}, "unknown key 'weight' of x"),
        ({"chat_template_path": "nowhere.j2"}, "the file cannot be read"),
        ({"chat_template_path": "nowhere"}, "no tokenizer can be loaded from there"),
        ({"ignore_bias_buffers": True}, "leave it out"),
    ],
)
def test_what_cannot_be_followed_is_refused_with_the_reason(given, reason):
    done = translate(given, recipe_keys("sft"))
    assert not done.values and reason in next(iter(done.refusals.values()))


@pytest.mark.parametrize(
    ("assistant", "completion", "train_on", "expected"),
    [
        (True, False, None, {}),  # assistant turns, whatever the other says
        (False, False, None, {"train_on": "all"}),
        (False, None, None, {"train_on": "all"}),
        (None, False, None, {"train_on": "all"}),
        ("false", None, None, {"train_on": "all"}),  # as a parser reads it
        (False, None, "all", {"train_on": "all"}),
        (False, True, None, "train_on has no such value"),
        (True, None, "all", "says something else"),
        (False, None, "assistant", "keep one of them"),
        (0, None, None, "neither true nor false"),
        ("perhaps", None, None, "neither true nor false"),
    ],
)
def test_what_is_trained_follows_from_both_keys(assistant, completion, train_on, expected):
    given = {"assistant_only_loss": assistant, "completion_only_loss": completion, "train_on": train_on}
    done = translate({key: value for key, value in given.items() if value is not None}, recipe_keys("sft"))
    if isinstance(expected, dict):
        assert done.values == expected and not done.refusals
        assert ("alone are trained" in " ".join(done.answers)) == (not expected)
    else:
        assert expected in " ".join(done.refusals.values())


def test_a_config_of_trl_that_does_not_say_what_is_trained_is_told():
    told = translate({"dataset_train_split": "train"}, recipe_keys("sft")).answers
    assert "TRL trains whole chats" in told[-1]
    assert translate({"dataset_split": "train"}, recipe_keys("sft")).answers == []  # one of ours


def test_datasets_of_one_name_are_told_apart():
    entries = [{"path": path} for path in ("o/x_2", "o/x", "p/x", "q/x")]
    sources = translate({"datasets": entries}, recipe_keys("sft")).values["sources"]
    assert {name: source["path"] for name, source in sources.items()} == {
        **{"x_2": "o/x_2", "x": "o/x", "x_1": "p/x", "x_3": "q/x"}
    }


@pytest.mark.parametrize("given", [{"dataset_split": "a"}, {"dataset_text_field": "x", "column_mapping": "{}"}])
def test_a_key_that_is_given_in_both_ways_is_refused(given):
    done = translate({"dataset_train_split": "b", **given}, recipe_keys("sft"))
    assert list(done.refusals.values())[-1].endswith("keep one of them")


def test_a_template_is_that_of_a_file_or_of_a_tokenizer(tmp_path):
    tokenizer = demo.build_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "mine.j2").write_text("{{ messages }}")
    for path, template in ((tmp_path, tokenizer.chat_template), (tmp_path / "mine.j2", "{{ messages }}")):
        assert translate({"chat_template_path": str(path)}, recipe_keys("sft")).values == {"chat_template": template}


def test_recipes_that_read_one_dataset():
    one = {"datasets": [{"path": "org/x", "name": "short", "split": "test"}]}
    done = translate(one, recipe_keys("dpo"))
    assert done.values == {"dataset_name": "org/x", "dataset_config": "short", "dataset_split": "test"}
    assert (
        "reads one dataset"
        in translate({"datasets": [{"path": "a"}, {"path": "b"}]}, recipe_keys("dpo")).refusals["datasets"]
    )
    assert "this recipe has no num_proc" in translate({"dataset_num_proc": 2}, {"x"}).refusals["dataset_num_proc"]


@pytest.mark.parametrize("recipe", ["dpo", "reward"])
def test_what_trainers_of_trl_read_too_late_is_read_by_recipes_of_pairs(recipe, tmp_path):
    """A model is loaded and rows are encoded before their trainers look at these."""
    (tmp_path / "mine.j2").write_text("{{ messages }}")
    given = {"model_init_kwargs": {"dtype": "bfloat16"}, "chat_template_path": str(tmp_path / "mine.j2")}
    done = translate({**given, "truncation_mode": "keep_start"}, recipe_keys(recipe))
    assert done.values == {"dtype": "bfloat16", "chat_template": "{{ messages }}"} and not done.refusals
    assert "loses the beginning of its prompt" in " ".join(done.answers)
    assert "truncation_mode" in translate({"truncation_mode": "keep_end"}, recipe_keys(recipe)).refusals


def test_special_tokens_of_a_reward_model_are_set_before_rows_are_encoded(tmp_path):
    tokenizer = demo.build_tokenizer()
    token = next(token for token in tokenizer.get_vocab() if token.isalpha())
    with pytest.raises(ConfigError, match="eos_token is '<nothing>', which the tokenizer does not have"):
        set_tokens(tokenizer, eos_token="<nothing>")
    set_tokens(tokenizer, eos_token=token, pad_token=None)
    assert tokenizer.eos_token == token and tokenizer.pad_token != token


def test_a_config_of_trl_is_printed_as_ours(tmp_path, capsys):
    (tmp_path / "trl.yaml").write_text("dataset_name: org/x\ndataset_train_split: train_sft\noutput_dir: out\n")
    with pytest.raises(SystemExit):
        parse_config(sft.Sft.arguments, ["--config", str(tmp_path / "trl.yaml"), "--print_config"])
    expected = {"dataset_name": "org/x", "dataset_split": "train_sft", "output_dir": "out"}
    assert yaml.safe_load(capsys.readouterr().out) == expected


def test_a_key_of_the_launcher_is_told_where_no_launcher_of_ours_started(tmp_path):
    (tmp_path / "trl.yaml").write_text("dataset_name: x.json\naccelerate_config: zero3\nnum_processes: 2\n")
    with pytest.raises(ConfigError) as error:
        parse_config(sft.Sft.arguments, ["--config", str(tmp_path / "trl.yaml"), "--output_dir", "out"])
    assert str(error.value).count("start the recipe with hf-objectives for it") == 2


def test_answers_and_refusals_reach_the_user_with_their_lines(tmp_path, capsys):
    path = tmp_path / "trl.yaml"
    path.write_text("dataset_name: x.json\nassistant_only_loss: true\noutput_dir: out\n")
    parse_config(sft.Sft.arguments, ["--config", str(path)])
    assert "assistant_only_loss: true: assistant turns and completions alone are trained" in capsys.readouterr().err
    path.write_text("dataset_name: x.json\npadding_free: true\nloss_type: dft\nmax_lenght: 3\n")
    with pytest.raises(ConfigError) as error:
        parse_config(sft.Sft.arguments, ["--config", str(path), "--output_dir", "out"])
    said = str(error.value)
    assert all(
        words in said for words in ("line 2: padding_free", "line 3: loss_type", "line 4: unknown key 'max_lenght'")
    )


COMMON = """
# as the scripts of TRL take it
output_dir: {folder}/run
model_name_or_path: {folder}/model
dataset_train_split: train
per_device_train_batch_size: 2
gradient_accumulation_steps: 1
gradient_checkpointing: false
learning_rate: 2.0e-5
max_steps: 2
logging_steps: 1
save_strategy: "no"
eval_strategy: "no"
bf16: false
use_cpu: true
report_to: none
"""
SFT_YAML = """
datasets:
  - path: json
    data_files: {folder}/chats.jsonl
    columns: [messages]
test_split_size: 0.1
max_length: 128
packing: true
packing_strategy: bfd
assistant_only_loss: true
dataset_num_proc: 1
use_peft: true
lora_r: 8
lora_target_modules: all-linear
"""
PAIRS_YAML = """
datasets:
  - path: json
    data_files: {folder}/pairs.jsonl
max_length: 128
dataset_num_proc: 1
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("main", "text"),
    [(sft.main, SFT_YAML), (dpo.main, PAIRS_YAML + "loss_type: sigmoid\nbeta: 0.1\n"), (reward.main, PAIRS_YAML)],
)
def test_yamls_of_its_scripts_run(main, text, tmp_path):
    save_small_model(tmp_path)
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({**row, "id": 1}) + "\n" for row in demo.chats(30)))
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in demo.preferences(30)))
    (tmp_path / "trl.yaml").write_text((COMMON + text).format(folder=tmp_path))
    results = main(["--config", str(tmp_path / "trl.yaml")])
    assert results["after"]["eval_loss"] > 0 and (tmp_path / "run" / "README.md").exists()


def test_fractions_count_rows_as_trl_does(tmp_path):
    """Three quarters of a set of 90 and a quarter of one of 10: the small one gives all it has, the other 30."""
    from hf_objectives.recipes.data import prepare

    for name, size in (("big", 90), ("small", 10)):
        rows = [{"prompt": f"{name} {i}", "completion": "x"} for i in range(size)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = {
        name: {"path": f"{tmp_path}/{name}.jsonl", "fraction": share}
        for name, share in (("big", 0.75), ("small", 0.25))
    }
    data = DataArguments(sources=json.dumps(sources), eval_share=0, packing=False)
    made = prepare(data, demo.build_tokenizer(), seed=0, output_dir=str(tmp_path))
    assert {name: account.rows_in for name, account in made.ledger.accounts.items()} == {"big": 30, "small": 10}


@pytest.mark.parametrize("share", [0, -1, True, "half", None])
def test_a_fraction_is_a_number_of_every_source(share):
    sources = {"a": {"path": "a.json", "fraction": 0.5}, "b": {"path": "b.json", "fraction": share}}
    with pytest.raises(ConfigError, match="fraction of source 'b' is"):
        DataArguments(sources=json.dumps(sources))


def test_training_arguments_are_the_parents():
    for config in SCRIPTS.values():
        assert issubclass(config, TrainingArguments)


def test_the_migration_guide_has_every_key():
    guide = (Path(__file__).parents[2] / "docs" / "migration.md").read_text(encoding="utf-8")
    assert [key for key in RULES if f"`{key}`" not in guide] == []
