"""The leak probe passes models that keep documents apart, and refuses those that do not."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, MambaConfig
from transformers.models.lfm2 import modeling_lfm2

from hf_objectives.collators import DataCollatorWithEosPacking
from hf_objectives.errors import PackingLeakError
from hf_objectives.labels import encode_row
from hf_objectives.trainers.isolation import probe_isolation
from tests.support.language_models import TOKENIZER, chats, llama, nats_of, trainer


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


SIZES = {
    "vocab_size": 264, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
DELTA = {
    "head_dim": 8, "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MIXED = {
    "qwen3_next": (DELTA | MOE | {"shared_expert_intermediate_size": 16}, "causal_conv1d"),
    "qwen3_5_text": (DELTA, "causal_conv1d"),
    "lfm2": ({"layer_types": ["conv", "full_attention"]}, "causal_conv1d"),
    "lfm2_moe": (MOE | {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1}, "causal_conv1d"),
    "bamba": (MAMBA | {"attn_layer_indices": [1]}, "mamba_ssm"),
    "falcon_h1": (MAMBA | {"mamba_d_ssm": 64, "head_dim": 8}, "mamba_ssm"),
    "granitemoehybrid": (
        MAMBA | {"layer_types": ["mamba", "attention"], "num_local_experts": 4, "shared_intermediate_size": 32},
        "mamba_ssm",
    ),
    "nemotron_h": (
        {
            "layers_block_type": ["mamba", "attention"], "mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8,
            "n_groups": 1, "chunk_size": 16, "head_dim": 8,
        },
        "mamba_ssm",
    ),
    # No kernel would help: its layers do not read where documents begin.
    "jamba": (
        {"num_experts": 2, "num_experts_per_tok": 1, "mamba_d_state": 8, "attn_layer_period": 2, "attn_layer_offset": 1},
        None,
    ),
}  # fmt: skip


def mixed(kind: str):
    """A model with attention and with layers that carry a state over a row."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES, **MIXED[kind][0])).eval()


@pytest.mark.parametrize("kind", MIXED)
def test_models_with_a_state_are_refused_without_their_kernels(kind):
    """lfm2 leaks so little at random weights that a bound which does not go with the size of logits lets it pass."""
    kernel = MIXED[kind][1]
    words = f"does not take packed documents: .* without `{kernel}`.*without packing" if kernel else "see each other"
    with pytest.raises(PackingLeakError, match=words):
        probe_isolation(mixed(kind))


def convolution_with_kernel(hidden, weight, bias=None, activation=None, seq_idx=None, **_):
    """What `causal_conv1d` computes: a token sees those before it that have its `seq_idx`."""
    out = torch.zeros_like(hidden)
    for back in range(weight.shape[1]):
        moved = torch.nn.functional.pad(hidden, (back, 0))[..., : hidden.shape[-1]]
        if seq_idx is not None:
            same = torch.nn.functional.pad(seq_idx, (back, 0), value=-1)[:, : seq_idx.shape[1]] == seq_idx
            moved = moved * same.unsqueeze(1)
        out = out + moved * weight[:, weight.shape[1] - 1 - back].unsqueeze(-1)
    return out if bias is None else out + bias.unsqueeze(-1)


def test_with_its_kernel_such_a_model_is_right_in_packed_rows(tmp_path, monkeypatch):
    """In rows of several documents, several rows to a batch."""
    model, rows = mixed("lfm2"), [encode_row(TOKENIZER, row) for row in chats(9)]
    nats = []
    for row in rows:
        own = nats_of(model, row["input_ids"])
        nats += [own[i - 1] for i in range(1, len(own) + 1) if row["labels"][i] != -100]
    monkeypatch.setattr(modeling_lfm2, "causal_conv1d_fn", convolution_with_kernel)
    assert probe_isolation(model).change == 0
    collator = DataCollatorWithEosPacking(TOKENIZER, max_length=200)
    assert collator(rows)["input_ids"].shape[0] > 1
    metrics = trainer(tmp_path, model=model, collator=collator, per_device_eval_batch_size=9).evaluate(rows)
    assert metrics["eval_num_tokens"] == len(nats)
    assert metrics["eval_loss"] == pytest.approx(sum(nats) / len(nats), rel=1e-6)
    # Without the bounds of documents in the batch, the kernel cannot help.
    collator.return_flash_attn_kwargs = False
    with pytest.raises(PackingLeakError, match="see each other"):
        trainer(tmp_path, model=model, collator=collator).evaluate(rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["bloom", "xglm", "bert"])
def test_a_leak_within_the_rounding_of_half_precision_is_a_leak(kind, dtype):
    """At random weights documents move each other's logits by less than a hundredth of the largest one; BERT's both ways."""
    sizes = {
        "bloom": {"vocab_size": 99, "hidden_size": 32, "n_layer": 2, "n_head": 4},
        "xglm": {"vocab_size": 99, "d_model": 32, "ffn_dim": 32, "num_layers": 2, "attention_heads": 4},
        "bert": {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    }  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes[kind])).to(dtype)
    with pytest.raises(PackingLeakError, match="see each other"):
        probe_isolation(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rounding", [True, False])
def test_rounding_that_is_seen_in_both_directions_is_no_leak(dtype, rounding):
    """Experts share batches, so that a kernel may round otherwise when other tokens are routed to them."""
    model = llama().to(dtype)
    forward = model.forward

    def rounds(input_ids, **kwargs):
        output = forward(input_ids=input_ids, **kwargs)
        whole = 1 + (1e-5 if dtype == torch.float32 else 1e-2) * (int(input_ids.sum()) % 5)
        kept = 1 if rounding else torch.arange(input_ids.shape[1]).ge(16).to(dtype).reshape(1, -1, 1)
        output.logits = output.logits * (1 + (whole - 1) * kept)
        return output

    model.forward = rounds
    if rounding:
        assert probe_isolation(model).change > 0
    else:
        with pytest.raises(PackingLeakError, match="see each other"):
            probe_isolation(model)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "olmoe"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixtures_of_experts_pass(kind, dtype):
    more = {
        "head_dim": 8,
        "moe_intermediate_size": 16,
        "num_experts": 4,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES, **more)).to(dtype)
    report = probe_isolation(model)
    assert report.change <= report.tolerance < 0.1


def test_a_leak_of_small_logits_is_a_leak():
    model = AutoModelForCausalLM.from_config(
        MambaConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, state_size=4, tie_word_embeddings=False)
    )
    with torch.no_grad():
        model.lm_head.weight.mul_(1e-5)
    with pytest.raises(PackingLeakError, match="see each other"):
        probe_isolation(model)


def test_without_bounds_of_documents_two_rows_are_probed():
    """Attention kernels find the documents of a single row by its positions, and those of several rows not."""
    model = llama()
    forward = model.forward

    def by_a_single_row(position_ids=None, cu_seq_lens_q=None, **kwargs):
        seen = position_ids if cu_seq_lens_q is not None or len(position_ids) == 1 else None
        return forward(position_ids=seen, **kwargs)

    model.forward = by_a_single_row
    probe_isolation(model)
    with pytest.raises(PackingLeakError, match="see each other"):
        probe_isolation(model, flash_attn_kwargs=False)
