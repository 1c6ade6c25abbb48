"""The model and the tokenizer that a recipe starts from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, set_seed
from trl import ModelConfig

from hf_objectives import demo
from hf_objectives.errors import ConfigError
from hf_objectives.recipes.models import PretrainModel, load_model, load_or_draw, load_policy, load_scorer
from tests.support.recipes import save_small_model

SIZES = ("builtin", "builtin:small")
TINY = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 2, "max_position_embeddings": 128}  # fmt: skip


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> tuple[Path, dict[str, torch.Tensor]]:
    """What fine-tuning with LoRA leaves: a folder with an adapter; and the weights that it makes of its base."""
    folder = tmp_path_factory.mktemp("adapter")
    tokenizer = demo.build_tokenizer()
    demo.build_model(tokenizer, hidden_size=32, num_layers=1).save_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    torch.manual_seed(0)
    lora = LoraConfig(target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    tuned = get_peft_model(base, lora)
    tuned.save_pretrained(folder / "tuned")
    for name in ("base", "tuned"):
        tokenizer.save_pretrained(folder / name)
    return folder / "tuned", tuned.merge_and_unload().state_dict()


def test_an_adapter_becomes_part_of_the_weights_and_all_are_trained(adapter):
    folder, merged = adapter
    policy, tokenizer = load_policy(ModelConfig(model_name_or_path=str(folder)), use_cpu=True)
    scorer, _ = load_scorer(ModelConfig(model_name_or_path=str(folder)), use_cpu=True)
    assert len(tokenizer) == 640 and scorer.score.weight.shape == (1, 32)
    for model in (policy, scorer):
        assert all(parameter.requires_grad and parameter.dtype == torch.float32 for parameter in model.parameters())
        weights = model.state_dict()
        body = [name for name in merged if name.startswith("model.")]
        assert body and all(torch.allclose(merged[name], weights[name], atol=1e-6) for name in body)


@pytest.mark.slow
def test_without_an_adapter_a_policy_is_the_model():
    config = ModelConfig(model_name_or_path="builtin")
    policy, model = load_policy(config)[0], load_model(config)[0]
    assert all(torch.equal(p, q) for p, q in zip(policy.parameters(), model.parameters(), strict=True))


@pytest.mark.slow
def test_the_built_in_model_has_a_small_one_beside_it():
    sizes = {name: load_model(ModelConfig(model_name_or_path=name))[0].num_parameters() for name in SIZES}
    assert sizes["builtin:small"] < sizes["builtin"] / 2
    model, tokenizer = load_scorer(ModelConfig(model_name_or_path="builtin:small"))
    assert model.config.num_labels == 1 and len(tokenizer) == model.config.vocab_size


def test_random_weights_follow_the_configuration_and_the_seed(tmp_path):
    config = PretrainModel(model_config=json.dumps(TINY), tokenizer_name="builtin")
    drawn = []
    for seed in (0, 0, 1):
        set_seed(seed)
        drawn.append(load_or_draw(config)[0])
    assert drawn[0].config.vocab_size == 640 and drawn[0].config.eos_token_id == demo.build_tokenizer().eos_token_id
    first, again, other = (model.lm_head.weight for model in drawn)
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize(
    ("load", "config", "words"),
    [
        (load_model, ModelConfig(), "model_name_or_path is missing"),
        (load_policy, ModelConfig(), "model_name_or_path is missing"),
        (load_scorer, ModelConfig(), "model_name_or_path is missing"),
        (load_model, ModelConfig(model_name_or_path="x", load_in_4bit=True), "load_in_4bit on a CPU"),
        (load_scorer, ModelConfig(model_name_or_path="x", load_in_4bit=True), "load_in_4bit on a CPU"),
        (load_or_draw, PretrainModel(model_config="{}", tokenizer_name="builtin"), "names no model_type"),
        (load_or_draw, PretrainModel(model_config=json.dumps(TINY)), "tokenizer_name is missing"),
        (
            load_or_draw,
            PretrainModel(model_config=json.dumps({**TINY, "vocab_size": 99}), tokenizer_name="builtin"),
            "the model's vocabulary has 99 ids, the tokenizer 640",
        ),
    ],
)
def test_what_cannot_be_loaded_is_named(load, config, words):
    with pytest.raises(ConfigError, match=words):
        load(config, use_cpu=True)


CUSTOM = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own_llama"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_code_of_a_repository_is_run_when_it_is_asked_for_alone(tmp_path):
    save_small_model(tmp_path)
    folder = tmp_path / "model"
    (folder / "modeling_own.py").write_text(CUSTOM)
    own = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "own_llama", "auto_map": own}
    (folder / "config.json").write_text(json.dumps(config))
    asked = ModelConfig(model_name_or_path=str(folder))
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_model(asked, use_cpu=True)
    loaded, _ = load_model(asked, use_cpu=True, trust_remote_code=True)
    assert type(loaded).__name__ == "OwnModel"
