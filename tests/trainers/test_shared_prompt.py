"""Packed pairs give the log-probabilities of each answer alone, under every mask; what cannot is refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    Lfm2Config,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    Qwen3Config,
)
from trl.trainer.utils import add_fused_lm_head

from hf_objectives.collators import share_prompts
from hf_objectives.errors import ConfigError, PackingLeakError
from hf_objectives.evaluation import after_head
from hf_objectives.trainers.shared_prompt import SharedPrompts, prompt_masks

WINDOW = 5
SIZES = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2,
}  # fmt: skip
LAYERS = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 8}
CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZES),
    "llama, tied": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
    "mistral, sliding window": lambda: MistralConfig(**SIZES, sliding_window=WINDOW),
    "gemma 2, alternating and soft-capped": lambda: Gemma2Config(
        **SIZES, **LAYERS, final_logit_softcapping=3.0, attn_logit_softcapping=2.0
    ),
    "gemma 3, alternating": lambda: Gemma3TextConfig(**SIZES, **LAYERS),
    "qwen 3": lambda: Qwen3Config(**SIZES, head_dim=8),
    "qwen 3, alternating": lambda: Qwen3Config(**SIZES, **LAYERS, use_sliding_window=True),
    "phi 3, sliding window": lambda: Phi3Config(**SIZES, sliding_window=WINDOW, pad_token_id=0),
    "gpt 2, learned positions": lambda: GPT2Config(
        vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2
    ),
    "cohere, scaled": lambda: CohereConfig(**SIZES, logit_scale=0.25),
}
PAIRS = [  # prompt, chosen, rejected: longer than the window, and so that two share a row
    ([11, 12, 13, 14, 15, 16, 17, 18, 19], [21, 22, 23, 24, 25, 26, 27, 28], [31, 32, 33, 34, 35]),
    ([41, 42], [43, 44, 45], [43, 46]),  # answers that begin alike
    ([51, 52, 53], [54], [55, 56, 57, 58]),
]


def model_of(name, attention="sdpa"):
    torch.manual_seed(0)
    config = CONFIGS[name]()
    config._attn_implementation = attention
    return AutoModelForCausalLM.from_config(config).eval()


def stub(model, reference=None, **changed):
    """What `SharedPrompts` reads of a trainer."""
    args = {
        "max_length": None,
        "device": torch.device("cpu"),
        "use_liger_kernel": False,
        "torch_compile": False,
        "neftune_noise_alpha": None,
    }
    args |= {name: value for name, value in changed.items() if name in args}
    return SimpleNamespace(
        model=model,
        ref_model=reference,
        args=SimpleNamespace(**args),
        accelerator=SimpleNamespace(mixed_precision="no", parallelism_config=changed.get("parallelism")),
        aux_loss_enabled=changed.get("aux_loss_enabled", False),
        figures_of=lambda model: ("entropy", "mean_logits", "is_top1", "log_sum_sq_probs"),
    )


def batch():
    sequences = [(pair[0], pair[side]) for side in (1, 2) for pair in PAIRS]
    width = max(len(prompt) + len(answer) for prompt, answer in sequences)
    ids, mask, labels = (torch.full((len(sequences), width), empty) for empty in (0, 0, -100))
    for row, (prompt, answer) in enumerate(sequences):
        end = len(prompt) + len(answer)
        ids[row, :end], mask[row, :end] = torch.tensor([*prompt, *answer]), 1
        labels[row, len(prompt) : end] = torch.tensor(answer)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def alone(model):
    """Log-probability, entropy, mean logit and whether it is the best, of each token of the answers, one after another."""
    figures = []
    for side in (1, 2):
        for prompt, *answers in PAIRS:
            answer = answers[side - 1]
            logits = model(torch.tensor([[*prompt, *answer]]), use_cache=False).logits[0].double()
            for at, token in enumerate(answer, start=len(prompt) - 1):
                logps = logits[at].log_softmax(-1)
                entropy = -(logps.exp() * logps).sum()
                best = float(logits[at].argmax() == token)
                figures.append(torch.stack([logps[token], entropy, logits[at].mean(), torch.tensor(best).double()]))
    return torch.stack(figures)


def packed(model, **changed):
    """The same of the packed pass, and the shapes that the layers saw."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    add_fused_lm_head(inner, outputs=("log_probs", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs"))
    shared = SharedPrompts(stub(model, **changed))
    shared.install()
    after_head(inner)  # its own pass is not counted
    shapes = []
    inner.get_input_embeddings().register_forward_hook(lambda module, args, output: shapes.append(output.shape[:2]))
    given = batch()
    output = model(**given, use_cache=False, fused_lm_head=True)
    wanted = given["labels"][:, 1:] != -100
    fields = [getattr(output, name) for name in ("log_probs", "entropy", "mean_logits", "is_top1")]
    assert all(not field[~wanted].any() for field in fields) and torch.equal(output.label_mask, wanted)
    return torch.stack([field[wanted].double() for field in fields], dim=1), shapes, shared


NAMES = [(name, "eager") for name in CONFIGS] + [(name, "sdpa") for name in CONFIGS if "soft-capped" not in name]


@pytest.mark.parametrize(("name", "attention"), NAMES)
def test_answers_are_what_they_are_alone(name, attention, monkeypatch):
    if attention == "eager":  # as if attention cost more: short rows
        monkeypatch.setattr("hf_objectives.collators.shared_prompt.BALANCE", 1)
    model = model_of(name, attention)
    expected = alone(model)
    (-expected[:, 0].sum() + expected[:, 1].sum()).backward()
    gradients = {key: parameter.grad.clone() for key, parameter in model.named_parameters()}
    model.zero_grad()
    found, shapes, shared = packed(model)
    # 9 + 8 + 5 tokens, 3 + 2 + 1 and 3 + 1 + 4
    assert shapes == [(2, 22) if attention == "eager" else (1, 36)]
    assert torch.allclose(found, expected, atol=1e-5)
    (-found[:, 0].sum() + found[:, 1].sum()).backward()
    for key, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, gradients[key], atol=1e-5 * float(gradients[key].abs().max())), key
    shared.prove(model)  # nor is it refused


def test_adapters_are_those_of_the_padded_pass():
    lora = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, target_modules=["q_proj", "down_proj"])
    model = get_peft_model(model_of("llama"), lora).eval()
    expected = alone(model)
    with model.disable_adapter():
        bare = alone(model)
    found, _, shared = packed(model)
    assert torch.allclose(found, expected, atol=1e-5) and not torch.allclose(bare, expected, atol=1e-2)
    given = batch()
    with model.disable_adapter():
        output = model(**given, use_cache=False, fused_lm_head=True)
    assert torch.allclose(output.log_probs[given["labels"][:, 1:] != -100].double(), bare[:, 0], atol=1e-5)
    shared.prove(model)


def test_half_precision_is_proved():
    model = model_of("llama").to(torch.bfloat16)
    add_fused_lm_head(model)
    shared = SharedPrompts(stub(model))
    shared.install()
    shared.prove(model)


def test_generation_and_plain_passes_are_untouched():
    model = model_of("llama")
    ids = torch.tensor([PAIRS[0][0]])
    plain, said = model(ids).logits, model.generate(ids, max_new_tokens=4, do_sample=False)
    packed(model)
    assert torch.equal(model(ids).logits, plain)
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), said)


def test_a_batch_without_a_label_has_a_gradient_of_0():
    model = model_of("llama")
    packed(model)
    given = batch()
    given["labels"] = torch.full_like(given["labels"], -100)
    output = model(**given, use_cache=False, fused_lm_head=True)
    output.log_probs.sum().backward()
    assert not output.log_probs.any()
    assert all(not parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None)


def test_masks_by_hand():
    """[1, 2 | 3, 4 | 5]: a prompt of two, a chosen answer of two, a rejected one of one."""
    ids = torch.tensor([[1, 2, 3, 4], [1, 2, 5, 0]])
    rows = share_prompts(ids.numpy(), (ids != 0).long().numpy())
    named = {name: torch.from_numpy(getattr(rows, name)) for name in ("pieces", "branches", "position_ids")}
    config = LlamaConfig(**SIZES, attn_implementation="sdpa")
    full = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 0, 0, 1]]
    assert prompt_masks(config, named, torch.float32).int().tolist() == [[full]]
    # A window of 2: each token sees the one before it, the rejected answer's first token the prompt's last.
    near = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 1, 0, 0, 1]]
    windowed = MistralConfig(**SIZES, sliding_window=2, attn_implementation="eager")
    mask = prompt_masks(windowed, named, torch.bfloat16)
    lowest = torch.finfo(torch.bfloat16).min
    assert mask.dtype == torch.bfloat16
    assert torch.equal(mask, torch.where(torch.tensor([[near]]) == 1, 0.0, lowest).bfloat16())
    both = Gemma3TextConfig(**SIZES, **{**LAYERS, "sliding_window": 2}, attn_implementation="sdpa")
    masks = prompt_masks(both, named, torch.float32)
    assert masks["full_attention"].int().tolist() == [[full]]
    assert masks["sliding_attention"].int().tolist() == [[near]]


def test_flash_attention_gets_sequences_end_to_end(monkeypatch):
    """No flash attention here: what it would be given, and what sdpa makes of the same rows by their positions."""
    model = model_of("llama")
    expected = alone(model)
    monkeypatch.setattr("hf_objectives.trainers.shared_prompt.is_flash_attention_requested", lambda config: True)
    given = {}
    model.model.register_forward_pre_hook(lambda module, args, kwargs: given.update(kwargs), with_kwargs=True)
    found, shapes, _ = packed(model)
    lengths = [17, 5, 4, 14, 4, 7]
    assert shapes == [(1, sum(lengths))] and given["attention_mask"] is None
    for side in ("q", "k"):
        assert given[f"cu_seq_lens_{side}"].tolist() == [0, 17, 22, 26, 40, 44, 51]
        assert given[f"cu_seq_lens_{side}"].dtype == torch.int32 and given[f"max_length_{side}"] == 17
    assert given["position_ids"].tolist() == [[at for length in lengths for at in range(length)]]
    assert torch.allclose(found, expected, atol=1e-5)


# -- the proof ---------------------------------------------------------------------------------------------------------


def proved(model, **changed):
    add_fused_lm_head(model)
    shared = SharedPrompts(stub(model, **changed))
    shared.install()
    shared.prove(model)


def test_the_proof_leaves_everything_as_it_was():
    model = model_of("llama").train()
    before = torch.get_rng_state()
    proved(model)
    assert model.training and torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("changed", ["no mask", "no positions", "no window"])
def test_the_proof_finds_a_model_that_leaks(changed):
    model = model_of("mistral, sliding window")
    if changed == "no window":  # the padded pass has one
        model.config.sliding_window = 1000
        forward = model.model.forward

        def narrow(attention_mask=None, position_ids=None, **kwargs):
            if attention_mask is not None and attention_mask.ndim == 2:
                model.config.sliding_window = WINDOW
            try:
                return forward(attention_mask=attention_mask, position_ids=position_ids, **kwargs)
            finally:
                model.config.sliding_window = 1000

        model.model.forward = narrow
    else:
        forward = model.model.forward
        dropped = "attention_mask" if changed == "no mask" else "position_ids"

        def blind(attention_mask=None, position_ids=None, **kwargs):
            given = {"attention_mask": attention_mask, "position_ids": position_ids}
            if position_ids is not None:  # the packed pass
                given[dropped] = None
            return forward(**given, **kwargs)

        model.model.forward = blind
    with pytest.raises(
        PackingLeakError, match=r"under attention 'sdpa' of MistralForCausalLM.*Set padding_free to False"
    ):
        proved(model)


@pytest.mark.parametrize("forgotten", ["branches", "pieces", "position_ids"])
def test_the_proof_finds_a_wrong_mask(forgotten, monkeypatch):
    """Answers that see each other, pairs that do, and a window over places: each alone is enough."""

    def wrong(config, rows, dtype):
        places = torch.arange(rows["pieces"].shape[1]).expand_as(rows["pieces"])
        return prompt_masks(config, {**rows, forgotten: places if forgotten == "position_ids" else 0 * places}, dtype)

    monkeypatch.setattr("hf_objectives.trainers.shared_prompt.prompt_masks", wrong)
    with pytest.raises(PackingLeakError, match="of packed pairs differ from padded ones"):
        proved(model_of("mistral, sliding window"))


def test_the_proof_finds_a_leak_that_a_tolerance_would_hide():
    """An answer moves those after it by a little: less than rounding between padded and packed rows may."""
    model = model_of("llama")
    forward = model.model.forward

    def leaking(position_ids=None, **kwargs):
        output = forward(position_ids=position_ids, **kwargs)
        if position_ids is not None:
            output.last_hidden_state = output.last_hidden_state + 1e-5 * output.last_hidden_state.cumsum(1)
        return output

    model.model.forward = leaking
    with pytest.raises(PackingLeakError, match="of one answer moved by"):
        proved(model)


def test_a_model_that_breaks_on_the_masks_is_refused():
    model = model_of("llama")
    forward = model.model.forward

    def two_dimensions(attention_mask=None, position_ids=None, **kwargs):
        if attention_mask is not None and attention_mask.ndim != 2:
            raise ValueError("a mask of two dimensions, please")
        return forward(attention_mask=attention_mask, position_ids=position_ids, **kwargs)

    model.model.forward = two_dimensions
    with pytest.raises(PackingLeakError, match="cannot be computed: ValueError: a mask of two dimensions, please"):
        proved(model)


def test_positions_that_a_model_reads_from_its_mask_are_found():
    torch.manual_seed(0)
    config = FalconConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True, attn_implementation="eager",
        initializer_range=0.2,
    )  # fmt: skip
    with pytest.raises(PackingLeakError, match="padding_free: log-probabilities of packed pairs"):
        proved(AutoModelForCausalLM.from_config(config).eval())


# -- what is refused ---------------------------------------------------------------------------------------------------

REFUSED = {
    "state": (lambda: MambaConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, state_size=4), {}, "keeps a state"),
    "hybrid": (
        lambda: Lfm2Config(**{**SIZES, "layer_types": ["conv", "full_attention"]}),
        {},
        "Lfm2ForCausalLM (keeps a state along a row|has layers of conv)",
    ),
    "chunks": (
        lambda: Llama4TextConfig(
            **SIZES, layer_types=["chunked_attention", "full_attention"], num_local_experts=2, head_dim=8,
            intermediate_size_mlp=48,
        ),
        {},
        "has layers of chunked_attention, whose masks are not known",
    ),
    "experts": (
        lambda: MixtralConfig(**SIZES, num_local_experts=2),
        {"aux_loss_enabled": True},
        "counts the tokens of each prompt twice; router_aux_loss_coef=0",
    ),
    "flex": (lambda: LlamaConfig(**SIZES, attn_implementation="flex_attention"), {}, "'flex_attention' takes no mask"),
    "liger": (lambda: LlamaConfig(**SIZES), {"use_liger_kernel": True}, "use_liger_kernel has not been proved"),
    "cut": (
        lambda: LlamaConfig(**SIZES),
        {"parallelism": SimpleNamespace(tp_size=2)},
        "tensor parallelism has not been proved",
    ),
    "noise": (lambda: LlamaConfig(**SIZES), {"neftune_noise_alpha": 5}, "neftune_noise_alpha scales its noise by the length"),
    "compiled": (lambda: LlamaConfig(**SIZES), {"torch_compile": True}, "torch_compile would compile each batch anew"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_packed_is_refused(name):
    config, changed, reason = REFUSED[name]
    model = AutoModelForCausalLM.from_config(config())
    with pytest.raises(ConfigError, match=rf"padding_free: .*{reason}.*Set padding_free to False"):
        SharedPrompts(stub(model, **changed)).install()


def test_learned_prompts_are_refused():
    model = get_peft_model(model_of("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ConfigError, match="padding_free: the model learns a prompt"):
        SharedPrompts(stub(model)).install()


def test_a_reference_is_refused_like_a_policy():
    mamba = AutoModelForCausalLM.from_config(REFUSED["state"][0]())
    with pytest.raises(ConfigError, match="MambaForCausalLM keeps a state"):
        SharedPrompts(stub(model_of("llama"), mamba)).install()


def test_columns_that_are_not_known_are_refused():
    model = model_of("llama")
    packed(model)
    with pytest.raises(ConfigError, match="has token_type_ids, which cannot be packed"):
        model(**batch(), token_type_ids=batch()["attention_mask"], fused_lm_head=True)
