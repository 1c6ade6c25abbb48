"""Packed pairs give the score of each text alone, under every mask and head; what cannot is refused."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import AutoModelForSequenceClassification, BertConfig, FalconConfig, MixtralConfig

from hf_objectives.errors import ConfigError, PackingLeakError
from hf_objectives.trainers.shared_prompt import prompt_masks
from hf_objectives.trainers.shared_prompt_scores import SharedPromptScores
from tests.trainers.test_shared_prompt import CONFIGS, PAIRS, REFUSED, SIZES, WINDOW, stub

PAD = 98
TEXTS = [
    *([*prompt, *answer] for prompt, answer, _ in PAIRS),
    *([*prompt, *answer] for prompt, _, answer in PAIRS),
]
LAYERED = [name for name in CONFIGS if name not in ("cohere, scaled", "llama, tied")]  # those are about the head
NAMES = [(name, "eager") for name in LAYERED] + [(name, "sdpa") for name in LAYERED if "soft-capped" not in name]


def classifier(config, attention="sdpa"):
    torch.manual_seed(0)
    config.pad_token_id, config.num_labels = PAD, 1
    config._attn_implementation = attention
    return AutoModelForSequenceClassification.from_config(config).eval()


def model_of(name, attention="sdpa"):
    return classifier(CONFIGS[name](), attention)


def batch(texts=TEXTS):
    width = max(map(len, texts))
    ids = torch.tensor([text + [PAD] * (width - len(text)) for text in texts])
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "use_cache": False}


def alone(model, texts=TEXTS):
    """The score at the last token of each text, by the backbone and the head."""
    return torch.cat([model.score(model.base_model(torch.tensor([text]))[0][:, -1]) for text in texts])


def packed(model, given=None, **changed):
    """Scores of the packed pass, and the shapes that the layers saw."""
    shared = SharedPromptScores(stub(model, **changed))
    shared.install()
    shapes = []
    handle = model.get_input_embeddings().register_forward_hook(lambda module, args, out: shapes.append(out.shape[:2]))
    with shared.packing(model):
        scores = model(**(given or batch())).logits
    handle.remove()
    return scores, shapes, shared


def assert_equal_gradients(model, expected, found):
    gradients = []
    for scores in (expected, found):
        model.zero_grad()
        scores.square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and gradients[0]
    for name, value in gradients[0].items():
        assert torch.allclose(gradients[1][name], value, atol=1e-5 * float(value.abs().max())), name


@pytest.mark.parametrize(("name", "attention"), NAMES)
def test_scores_are_those_of_each_text_alone(name, attention, monkeypatch):
    if attention == "eager":  # as if attention cost more: short rows
        monkeypatch.setattr("hf_objectives.collators.shared_prompt.BALANCE", 1)
    model = model_of(name, attention)
    expected = alone(model)
    assert float(expected.detach().std()) > 0.05  # scores that differ
    found, shapes, shared = packed(model)
    # 9 + 8 + 5 tokens, 3 + 2 + 1 and 3 + 1 + 4; padded it is six rows of 17
    assert shapes == [(2, 22) if attention == "eager" else (1, 36)]
    assert torch.allclose(found, expected, atol=1e-5)
    assert_equal_gradients(model, expected, found)
    shared.prove(model)  # nor is it refused


def test_a_text_that_another_begins_with_and_equal_ones():
    texts = [[5, 6, 7], [5, 6, 7, 8], [9], [5, 6, 7, 8], [5, 6, 7], [9]]
    model = model_of("llama")
    expected = alone(model, texts)
    found, shapes, _ = packed(model, batch(texts))
    assert torch.allclose(found, expected, atol=1e-5) and torch.equal(found[2], found[5])
    assert_equal_gradients(model, expected, found)
    assert shapes == [(1, 9)]  # 4, 4 and 1


def test_a_score_is_read_where_the_padded_pass_reads_it():
    """Where a text ends with the padding token, as `allow_eos_padding` lets it, that is before its end."""
    given = batch()
    given["input_ids"][0, -1] = given["input_ids"][4, 4] = PAD
    model = model_of("llama")
    expected = model(**given).logits
    assert torch.allclose(packed(model, given)[0], expected, atol=1e-5)
    assert torch.allclose(expected[0], alone(model, [TEXTS[0][:-1]])[0], atol=1e-5)


@pytest.mark.parametrize("saved", [None, ["score"]], ids=["head frozen", "head trained"])
def test_adapters_and_a_head_of_their_own(saved):
    lora = LoraConfig(
        task_type="SEQ_CLS", init_lora_weights=False, target_modules=["q_proj", "down_proj"], modules_to_save=saved
    )
    model = get_peft_model(model_of("llama"), lora).eval()
    expected = torch.cat([model(**batch([text])).logits for text in TEXTS])
    found, shapes, shared = packed(model)
    assert shapes == [(1, 36)] and torch.allclose(found, expected, atol=1e-5)
    assert_equal_gradients(model, expected, found)
    with model.disable_adapter():
        assert not torch.allclose(model(**batch()).logits, expected, atol=1e-2)
    shared.prove(model)


def test_other_heads_and_half_precision_are_proved():
    model = model_of("llama")
    model.score = nn.Sequential(nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 1))
    expected = alone(model)
    found, _, shared = packed(model)
    assert torch.allclose(found, expected, atol=1e-5)
    shared.prove(model)
    half = model_of("qwen 3").to(torch.bfloat16)
    packed(half)[2].prove(half)


def test_experts_have_no_auxiliary_loss_in_a_reward_model():
    model = classifier(MixtralConfig(**SIZES, num_local_experts=2, output_router_logits=True))
    trainer = stub(model)
    del trainer.aux_loss_enabled  # TRL's RewardTrainer has none
    shared = SharedPromptScores(trainer)
    shared.install()
    shared.prove(model)
    expected = alone(model)
    with shared.packing(model):
        assert torch.allclose(model(**batch()).logits, expected, atol=1e-5)


def test_a_batch_without_padding_needs_no_mask():
    model = model_of("llama")
    texts = [[5, 6, 7], [5, 6, 8]]
    given = {"input_ids": torch.tensor(texts), "use_cache": False}
    found, shapes, _ = packed(model, given)
    assert shapes == [(1, 4)] and torch.allclose(found, alone(model, texts), atol=1e-5)


def test_outside_of_the_loss_a_model_is_as_before():
    model = model_of("llama")
    three = batch(TEXTS[:3])  # no pairs
    before = model(**three).logits
    _, _, shared = packed(model)
    shared.prove(model)
    assert torch.equal(model(**three).logits, before)
    assert not model.model._forward_hooks and not model.model._forward_pre_hooks and "forward" not in vars(model)


def test_flash_attention_gets_sequences_end_to_end(monkeypatch):
    """No flash attention here: what it would be given, and what sdpa makes of the same rows by their positions."""
    monkeypatch.setattr("hf_objectives.trainers.shared_prompt.is_flash_attention_requested", lambda config: True)
    model, given = model_of("llama"), {}
    model.model.layers[0].register_forward_pre_hook(lambda module, args, kwargs: given.update(kwargs), with_kwargs=True)
    found, shapes, _ = packed(model)
    assert shapes == [(1, 51)] and given["cu_seq_lens_q"].tolist() == [0, 17, 22, 26, 40, 44, 51]
    assert torch.allclose(found, alone(model), atol=1e-5)


# -- the proof ---------------------------------------------------------------------------------------------------------


def prove(model):
    shared = SharedPromptScores(stub(model))
    shared.install()
    shared.prove(model)


def changing(model, change):
    """The model, whose layers get changed inputs in the packed pass."""
    forward = model.base_model.forward

    def changed(input_ids=None, attention_mask=None, position_ids=None, **kwargs):
        given = {"attention_mask": attention_mask, "position_ids": position_ids}
        if position_ids is not None:  # the packed pass
            given = change(given)
        return forward(input_ids=input_ids, **given, **kwargs)

    model.base_model.forward = changed
    return model


@pytest.mark.parametrize("zero_head", [False, True])
@pytest.mark.parametrize("dropped", ["attention_mask", "position_ids"])
def test_the_proof_finds_a_model_that_leaks(dropped, zero_head):
    """A new head may begin with 0: then all scores are equal, whatever the layers do."""
    model = changing(model_of("mistral, sliding window"), lambda given: {**given, dropped: None})
    if zero_head:
        nn.init.zeros_(model.score.weight)
    with pytest.raises(
        PackingLeakError,
        match=r"hidden states under the scores of packed pairs differ .* of MistralForSequenceClassification; .*padding_free",
    ):
        prove(model)


@pytest.mark.parametrize("forgotten", ["branches", "pieces", "position_ids"])
def test_the_proof_finds_a_wrong_mask(forgotten, monkeypatch):
    def wrong(config, rows, dtype):
        places = torch.arange(rows["pieces"].shape[1]).expand_as(rows["pieces"])
        return prompt_masks(config, {**rows, forgotten: places if forgotten == "position_ids" else 0 * places}, dtype)

    monkeypatch.setattr("hf_objectives.trainers.shared_prompt.prompt_masks", wrong)
    assert len(PAIRS[0][0]) > WINDOW
    with pytest.raises(PackingLeakError, match="of packed pairs differ from padded ones"):
        prove(model_of("mistral, sliding window"))


def test_the_proof_finds_a_leak_that_a_tolerance_would_hide():
    model = model_of("llama")
    forward = model.model.forward

    def leaking(input_ids=None, position_ids=None, **kwargs):
        output = forward(input_ids=input_ids, position_ids=position_ids, **kwargs)
        if position_ids is not None:
            output.last_hidden_state = output.last_hidden_state + 1e-6 * output.last_hidden_state.cumsum(1)
        return output

    model.model.forward = leaking
    with pytest.raises(PackingLeakError, match="of one answer moved by"):
        prove(model)


def test_the_proof_finds_a_head_that_reads_padding():
    class Mean(nn.Linear):
        def forward(self, hidden):
            return super().forward(hidden.mean(1, keepdim=True)).expand(-1, hidden.shape[1], -1)

    model = model_of("llama")
    model.score = Mean(32, 1)
    with pytest.raises(PackingLeakError, match="give scores that are not finite: the head reads padding"):
        prove(model)


def test_the_proof_leaves_everything_as_it_was():
    model = model_of("llama").train()
    before = torch.get_rng_state()
    prove(model)
    assert model.training and torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in model.parameters())


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in REFUSED if name in ("cut", "noise", "liger", "compiled", "flex")])
def test_what_dpo_refuses_is_refused(name):
    config, changed, reason = REFUSED[name]
    with pytest.raises(ConfigError, match=rf"padding_free: .*{reason}.*Set padding_free to False"):
        SharedPromptScores(stub(classifier(config(), config()._attn_implementation), **changed)).install()


def test_learned_prompts_are_refused():
    model = get_peft_model(model_of("llama"), PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3))
    with pytest.raises(ConfigError, match="padding_free: the model learns a prompt"):
        SharedPromptScores(stub(model)).install()


def test_encoders_and_positions_from_a_mask_are_found():
    sizes = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    bert = classifier(BertConfig(**sizes, intermediate_size=48, max_position_embeddings=64))
    falcon = classifier(FalconConfig(**sizes, alibi=True, initializer_range=0.2), "eager")
    for model in (bert, falcon):
        with pytest.raises(PackingLeakError, match="padding_free: hidden states under the scores of packed pairs"):
            prove(model)


def test_columns_that_are_not_known_are_refused():
    with pytest.raises(ConfigError, match="has cache_position, which cannot be packed"):
        packed(model_of("llama"), {**batch(), "cache_position": torch.arange(17)})
