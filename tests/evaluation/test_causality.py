"""Models whose tokens see those after them are refused; causal ones pass, mixtures of experts too."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, XLNetConfig, XLNetLMHeadModel

from hf_objectives import compute_perplexity
from hf_objectives.errors import ConfigError
from hf_objectives.evaluation import probe_causality
from tests.support.language_models import TOKENIZER, llama, trainer

SIZES = {
    "vocab_size": 264, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}  # fmt: skip


def xlnet():
    """It sees all tokens where it gets no permutation mask, and no setting of its config says so."""
    torch.manual_seed(0)
    return XLNetLMHeadModel(XLNetConfig(vocab_size=264, d_model=32, n_layer=1, n_head=4, d_inner=32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_sees_later_tokens_is_refused(dtype):
    with pytest.raises(ConfigError, match="XLNetLMHeadModel lets a token see those after it.*moved earlier logits by"):
        probe_causality(xlnet().to(dtype))


def test_training_evaluation_and_perplexity_refuse_it(tmp_path):
    for use in (
        lambda: trainer(tmp_path, model=xlnet()).train(),
        lambda: trainer(tmp_path, model=xlnet()).evaluate([{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}]),
        lambda: compute_perplexity(xlnet(), TOKENIZER, ["a b c"]),
    ):
        with pytest.raises(ConfigError, match="lets a token see those after it"):
            use()


@pytest.mark.parametrize("kind", ["llama", "mixtral", "qwen3_moe", "gpt2", "mamba"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_causal_models_pass_and_stay_as_they_were(kind, dtype):
    torch.manual_seed(0)
    sizes = SIZES if kind in ("llama", "mixtral", "qwen3_moe") else {"vocab_size": 264}
    small = {"gpt2": {"n_embd": 32, "n_layer": 1, "n_head": 4}, "mamba": {"hidden_size": 32, "num_hidden_layers": 1}}
    model = (
        AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **small.get(kind, {}))).to(dtype).train()
    )
    before = torch.get_rng_state()
    probe_causality(model)
    assert model.training and torch.equal(torch.get_rng_state(), before)


def test_of_a_model_of_ones_own_nothing_is_asked():
    model, calls = torch.nn.Linear(2, 2), []
    model.forward = lambda **given: calls.append(given)
    probe_causality(model)
    assert not calls


def test_nothing_is_compiled_for_it():
    torch.compiler.reset()  # earlier tests may have used up the recompilations of this code
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    model = torch.compile(llama(), backend=backend)
    probe_causality(model)
    assert not compiled
    model(input_ids=torch.tensor([[1, 2, 3]]))
    assert compiled


def test_a_leak_of_one_layer_is_seen():
    """A later token that reaches earlier ones through one small path."""
    model = llama()
    usual = model.model.norm.forward
    model.model.norm.forward = lambda hidden: usual(hidden) + 1e-6 * hidden.mean(1, keepdim=True)
    with pytest.raises(ConfigError, match="lets a token see those after it"):
        probe_causality(model)
