"""The leak probe passes models that keep documents apart, and refuses those that do not."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MambaConfig

from hf_objectives.errors import PackingLeakError
from hf_objectives.trainers.isolation import probe_isolation
from tests.support.language_models import llama


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_llama_keeps_documents_apart(attention, dtype):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        attention_dropout=0.5, attn_implementation=attention,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).to(dtype).train()
    before = torch.get_rng_state()
    report = probe_isolation(model)
    assert report.change <= report.tolerance and report.attention == attention
    assert model.training and torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_recurrent_model_is_refused():
    config = MambaConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, state_size=4)
    with pytest.raises(PackingLeakError, match="packed documents see each other"):
        probe_isolation(AutoModelForCausalLM.from_config(config))


def test_a_model_that_ignores_positions_is_refused():
    model = llama()
    forward = model.forward
    model.forward = lambda position_ids=None, **kwargs: forward(**kwargs)
    with pytest.raises(PackingLeakError, match="under attention 'sdpa' in training mode"):
        probe_isolation(model)
    assert not model.training
