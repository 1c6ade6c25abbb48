"""Configs of other tools: told apart, converted as far as they go, and named where they are given as they are."""

from __future__ import annotations

import pytest

from hf_objectives.cli.recipe_options import recipe_keys
from hf_objectives.errors import ConfigError
from hf_objectives.recipes import parse_config, sft
from hf_objectives.recipes.other_tools import KEYS, SYNONYMS, convert_config, tool_of

AXOLOTL = {
    **{
        "base_model": "org/base",
        "load_in_4bit": True,
        "adapter": "qlora",
        "sequence_len": 4096,
        "sample_packing": True,
    },
    "datasets": [
        {"path": "org/talks", "type": "chat_template", "split": "train"},
        {"path": "own.jsonl", "type": "alpaca"},
    ],
    **{"val_set_size": 0.05, "lora_r": 32, "lora_alpha": 16, "lora_target_linear": True, "micro_batch_size": 2},
    **{"gradient_accumulation_steps": 4, "num_epochs": 3, "optimizer": "adamw_bnb_8bit", "lr_scheduler": "cosine"},
    **{"learning_rate": 2e-4, "bf16": True, "flash_attention": True, "train_on_inputs": False, "warmup_ratio": 0.1},
    **{"wandb_project": "x", "chat_template": "chatml", "output_dir": "runs/x"},
}
FACTORY = {
    **{"model_name_or_path": "org/base", "stage": "dpo", "do_train": True, "finetuning_type": "lora", "lora_rank": 8},
    **{"lora_target": "all", "pref_beta": 0.1, "pref_loss": "sigmoid", "dataset": "dpo_en_demo", "template": "llama3"},
    **{"cutoff_len": 2048, "preprocessing_num_workers": 16, "output_dir": "runs/x", "val_size": 500, "plot_loss": True},
    **{"per_device_train_batch_size": 1, "num_train_epochs": 3.0, "lr_scheduler_type": "cosine", "max_samples": 1000},
}


def test_axolotl():
    done = convert_config(AXOLOTL, recipe_keys)
    assert done.tool == "axolotl" and done.recipe == "sft"
    assert done.values == {
        **{
            "model_name_or_path": "org/base",
            "load_in_4bit": True,
            "use_peft": True,
            "max_length": 4096,
            "packing": True,
        },
        "sources": {"talks": {"path": "org/talks", "split": "train"}, "own": {"path": "own.jsonl"}},
        **{"eval_share": 0.05, "lora_r": 32, "lora_alpha": 16, "lora_target_modules": "all-linear"},
        **{"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "num_train_epochs": 3},
        **{"optim": "adamw_bnb_8bit", "lr_scheduler_type": "cosine", "learning_rate": 2e-4, "bf16": True},
        **{"attn_implementation": "flash_attention_2", "warmup_steps": 0.1, "output_dir": "runs/x"},
    }
    assert {*done.rest} == {"datasets.type", "wandb_project", "chat_template"}


def test_llama_factory():
    done = convert_config(FACTORY, recipe_keys)
    assert done.tool == "LLaMA-Factory" and done.recipe == "dpo"
    assert done.values == {
        **{"model_name_or_path": "org/base", "use_peft": True, "lora_r": 8, "lora_target_modules": "all-linear"},
        **{"beta": 0.1, "loss_type": "sigmoid", "max_length": 2048, "dataset_num_proc": 16, "output_dir": "runs/x"},
        **{"per_device_train_batch_size": 1, "num_train_epochs": 3.0, "lr_scheduler_type": "cosine", "eval_share": 0},
    }
    assert {*done.rest} == {"dataset", "template", "val_size", "max_samples", "overlength"}


@pytest.mark.parametrize("config", [AXOLOTL, FACTORY])
def test_what_is_written_are_options_of_the_recipe(config):
    done = convert_config(config, recipe_keys)
    assert {*done.values} <= recipe_keys(done.recipe)


def test_what_a_config_leaves_out_has_the_defaults_of_its_tool():
    """Neither packs nor holds out by default, and LLaMA-Factory cuts what is too long; ours would do otherwise."""
    axolotl = convert_config({"base_model": "x", "num_epochs": 1, "fp16": None, "bf16": "auto"}, recipe_keys)
    assert axolotl.values == {"model_name_or_path": "x", "num_train_epochs": 1, "packing": False, "eval_share": 0}
    assert axolotl.rest == {"bf16": "'auto'; say true or false"}
    factory = convert_config({"stage": "sft", "cutoff_len": 64, "lora_target": "q_proj,v_proj"}, recipe_keys)
    assert factory.values == {
        **{"max_length": 64, "overlength": "cut", "lora_target_modules": ["q_proj", "v_proj"]},
        **{"packing": False, "eval_share": 0},
    }


@pytest.mark.parametrize("stage", ["pt", "sft", "rm", "dpo", "ppo"])
def test_every_stage_gives_options_of_its_recipe(stage, tmp_path):
    done = convert_config({**FACTORY, "stage": stage}, recipe_keys)
    assert {*done.values} <= recipe_keys(done.recipe)
    assert {*FACTORY} - {*done.rest} >= {"model_name_or_path", "cutoff_len", "output_dir"}


def test_datasets_keep_their_names_apart_and_one_of_them_serves_a_recipe_of_pairs():
    three = [{"path": path} for path in ("o/x_2", "o/x", "p/x")]
    found = convert_config({**AXOLOTL, "datasets": three}, recipe_keys).values["sources"]
    assert [source["path"] for source in found.values()] == ["o/x_2", "o/x", "p/x"]
    done = convert_config({**AXOLOTL, "rl": "dpo", "datasets": [{"path": "o/x", "split": "train[:9]"}]}, recipe_keys)
    assert (done.values["dataset_name"], done.values["dataset_split"]) == ("o/x", "train[:9]")


def test_special_tokens():
    given = {**AXOLOTL, "special_tokens": {"pad_token": "<p>", "eos_token": "<e>", "bos_token": "<b>"}}
    done = convert_config(given, recipe_keys)
    assert (done.values["pad_token"], done.values["eos_token"]) == (
        "<p>",
        "<e>",
    ) and "special_tokens.bos_token" in done.rest


def test_ours_and_trls_are_of_no_other_tool():
    assert tool_of({"model_name_or_path": "x", "dataset_name": "y", "max_length": 1, "lora_r": 8}) is None
    assert convert_config({"output_dir": "x"}, recipe_keys) is None


def test_a_config_of_another_tool_is_named_with_the_converter(tmp_path):
    (tmp_path / "a.yaml").write_text("base_model: x\nmicro_batch_size: 2\n")
    with pytest.raises(ConfigError, match="is a config of axolotl; `hf-objectives convert .*a.yaml` writes ours"):
        parse_config(sft.Sft.arguments, ["--config", str(tmp_path / "a.yaml")])


def test_synonyms_lead_to_options():
    options = set().union(*(recipe_keys(name) for name in ("sft", "dpo", "pretrain", "reward")))
    assert {*SYNONYMS.values()} - options == set()
    clashes = {
        theirs for keys in KEYS.values() for theirs, ours in keys.items() if theirs in options and theirs != ours
    }
    assert clashes == {"dataset_num_proc"}  # which recipes of alignment have


@pytest.mark.parametrize(
    ("key", "ours"),
    [("lora_rank", "lora_r"), ("torch_dtype", "dtype"), ("cutoff_len", "max_length"), ("lr", "learning_rate")],
)
def test_a_synonym_comes_before_the_nearest_spelling(key, ours, tmp_path):
    (tmp_path / "a.yaml").write_text(f"{key}: 1\n")
    with pytest.raises(ConfigError, match=f"unknown key '{key}'; here it is '{ours}'"):
        parse_config(sft.Sft.arguments, ["--config", str(tmp_path / "a.yaml")])
