"""Logits of chosen positions are the full forward's at these positions, in every architecture."""

from __future__ import annotations

import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
)

from hf_objectives.errors import ConfigError
from hf_objectives.evaluation.logits import HeadInputs, at_head, selected_logits, token_score_outputs

SMALL = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS = {
    "llama": lambda: LlamaConfig(**SMALL),
    "gemma2": lambda: Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=3.0),
    "cohere": lambda: CohereConfig(**SMALL, logit_scale=0.25),
    "granite": lambda: GraniteConfig(**SMALL, logits_scaling=4.0),
    "gpt2": lambda: GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2),
}


def build(name):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()


def inputs():
    torch.manual_seed(1)
    return {"input_ids": torch.randint(3, 99, (3, 10)), "attention_mask": torch.ones(3, 10, dtype=torch.long)}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("lora", [False, True])
def test_selected_are_the_full_forwards(name, lora):
    model = build(name)
    if lora:
        model = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")).eval()
    positions = torch.rand(3, 10) < 0.3
    with torch.no_grad():
        full = model(**inputs(), use_cache=False).logits[positions]
        assert torch.allclose(selected_logits(model, inputs(), positions), full, atol=1e-6)
        assert torch.allclose(selected_logits(model, inputs(), positions, full=True), full, atol=1e-6)


@pytest.mark.parametrize("name", [*CONFIGS, "unknown"])
def test_token_scores_are_those_of_the_models_logits(name):
    """Two targets of one place too, as the answers of a pair have; a head that does something of its own gives its logits."""
    model = build("llama" if name == "unknown" else name)
    if name == "unknown":
        model.lm_head.register_forward_hook(lambda module, args, output: output.sin())
    places, targets = torch.tensor([3, 9, 9, 25]), torch.tensor([5, 7, 98, 0])
    figures = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    logits = model(**inputs(), use_cache=False).logits.double().flatten(0, 1)[places] / 0.7
    every = logits.log_softmax(dim=-1)
    own, entropy = every[range(4), targets], -(every.exp() * every).sum(dim=-1)
    (own.sum() + 2 * entropy.sum()).backward()
    expected = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    found, _ = token_score_outputs(
        model, inputs(), torch.Size((3, 10)), places, targets, temperature=0.7, figures=figures
    )
    (found.log_probs.sum() + 2 * found.entropy.sum()).backward()
    assert torch.allclose(found.log_probs.double(), own, atol=1e-5)
    assert torch.allclose(found.entropy.double(), entropy, atol=1e-5)
    assert torch.allclose(found.log_sum_sq_probs.double(), (2 * every).logsumexp(dim=-1), atol=1e-5)
    assert torch.allclose(found.mean_logits.double(), logits.mean(dim=-1), atol=1e-5)
    assert found.is_top1.tolist() == (logits.argmax(dim=-1) == targets).tolist()
    for name, weight in model.named_parameters():
        assert torch.allclose(weight.grad, expected[name], atol=1e-5 * float(expected[name].abs().max()) + 1e-9), name


def test_the_head_sees_no_other_position():
    model, seen = build("llama"), []
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    positions = torch.zeros(3, 10, dtype=torch.bool)
    positions[0, 3] = positions[2, 1] = True
    selected_logits(model, inputs(), positions)
    assert seen == [(1, 2, 99)]


def test_no_positions_still_reach_the_graph():
    model = build("llama").train()
    logits = selected_logits(model, inputs(), torch.zeros(3, 10, dtype=torch.bool))
    assert logits.shape == (0, 99)
    logits.sum().backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() == 0


def test_gradient_checkpointing_and_autocast():
    model = build("llama").train()
    model.gradient_checkpointing_enable()
    positions = torch.rand(3, 10) < 0.5
    with torch.autocast("cpu", dtype=torch.bfloat16):
        selected_logits(model, inputs(), positions).float().sum().backward()
    assert model.model.embed_tokens.weight.grad.abs().sum() > 0


def test_fallback_says_so(caplog):
    class Headless(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = build("llama")

        def forward(self, **kwargs):
            return self.inner(**kwargs)

    positions = torch.rand(3, 10) < 0.5
    with caplog.at_level(logging.WARNING):
        logits = selected_logits(Headless(), inputs(), positions)
    assert logits.shape == (int(positions.sum()), 99)
    assert "Headless has no output embeddings; computing full logits" in caplog.text


def test_contact_the_model_with_logits_to_keep_agrees():
    """A model's own `logits_to_keep` with an index is the reference for one row."""
    model = build("gemma2")
    one = {key: value[:1] for key, value in inputs().items()}
    index = torch.tensor([1, 4, 7])
    positions = torch.zeros(1, 10, dtype=torch.bool)
    positions[0, index] = True
    with torch.no_grad():
        kept = model(**one, logits_to_keep=index, use_cache=False).logits[0]
        assert torch.allclose(selected_logits(model, one, positions), kept, atol=1e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_a_head_makes_logits_from(name):
    """Its product, scaled and capped, is the model's logits; the 0 that comes with it reaches the whole model."""
    model, places = build(name), torch.tensor([1, 12, 29])
    full = model(**inputs(), use_cache=False).logits.flatten(0, 1)[places]

    def logits(head: HeadInputs):
        made = head.after.scale * torch.nn.functional.linear(head.states, head.weight, head.bias)
        return made if head.after.softcap is None else head.after.softcap * torch.tanh(made / head.after.softcap)

    found, nothing = at_head(model, inputs(), torch.Size([3, 10]), places, logits)
    assert torch.allclose(found, full, atol=1e-5) and float(nothing.detach()) == 0
    nothing.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_head_that_is_not_known(monkeypatch):
    model = build("llama")
    usual = type(model).forward

    def squared(self, *args, **kwargs):
        output = usual(self, *args, **kwargs)
        output.logits = output.logits**2
        return output

    monkeypatch.setattr(type(model), "forward", squared)
    with pytest.raises(ConfigError, match="LlamaForCausalLM makes its logits in a way that is not known"):
        at_head(model, inputs(), torch.Size([3, 10]), torch.tensor([0]), lambda head: head)
