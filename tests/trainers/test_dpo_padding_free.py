"""`PerplexityDPOTrainer(padding_free=True)`: packed pairs give the loss, gradients, metrics and figures of padded ones."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import add_fused_lm_head

from hf_objectives import PerplexityDPOConfig, PerplexityDPOTrainer
from hf_objectives.errors import ConfigError, PackingLeakError
from tests.support.dpo_worlds import BATCH, PAIRS, TOKENIZER, build, load, options, ours
from tests.support.language_models import mixtral
from tests.trainers.test_dpo_parent import LOSSES

LORA = {"peft_config": LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], r=4)}


def step(run):
    """Loss, gradients and TRL's metrics of one training batch."""
    run.model.train()
    loss = run.compute_loss(run.model, dict(BATCH))
    loss.backward()
    gradients = {name: p.grad for name, p in run.model.named_parameters() if p.grad is not None}
    return loss.item(), gradients, dict(run._metrics["train"])


def assert_equal_steps(padded, packed, share=1e-5):
    (loss, gradients, metrics), (our_loss, our_gradients, our_metrics) = padded, packed
    assert our_loss == pytest.approx(loss, rel=1e-5, abs=1e-6)
    assert our_gradients.keys() == gradients.keys() and gradients
    for name, value in gradients.items():
        assert torch.allclose(our_gradients[name], value, atol=share * float(value.abs().max()) + 1e-12), name
    assert our_metrics.keys() == metrics.keys() and "rewards/margins" in metrics and "entropy" in metrics
    for name, values in metrics.items():
        assert our_metrics[name] == pytest.approx(values, rel=1e-5, abs=1e-5), name


def watched(run):
    """Rows and length of every pass through the layers of the policy, the proof's included."""
    shapes = []
    inner = run.model.get_base_model() if hasattr(run.model, "get_base_model") else run.model
    inner.model.layers[0].register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape[:2])))
    return shapes


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
def test_loss_gradient_and_metrics_are_trls(name, folders, tmp_path):
    named = {"trainer": {"ref_model": load(folders[1])}, **LOSSES[name]}
    padded = step(build(DPOTrainer, load(folders[0]), tmp_path, **named))
    named["trainer"] = {"ref_model": load(folders[1])}
    # Sums of hundreds of nats are rounded by 1e-5, which DiscoPOP multiplies (it divides margins by 0.05), and forward KL
    # (it takes exp of log ratios).
    share = 1e-4 if name in ("discopop", "forward_kl") else 1e-5
    assert_equal_steps(padded, step(ours(load(folders[0]), tmp_path, padding_free=True, **named)), share)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trainer", "changed"),
    [
        ({}, {}),
        (LORA, {}),
        (LORA, {"gradient_checkpointing": True}),
        ({}, {"precompute_ref_log_probs": True}),
        (LORA, {"precompute_ref_log_probs": True, "ld_alpha": 0.5}),
        ({}, {"nll_weight": 0.5, "dpop_lambda": 3.0}),
        ({}, {"sync_ref_model": True, "ref_model_sync_steps": 1}),
        ({}, {"max_length": 48}),
    ],
)
def test_a_run_and_its_evaluations_are_the_padded_ones(trainer, changed, folders, tmp_path):
    logs, tokens = [], []
    for free in (False, True):
        torch.manual_seed(0)
        run = ours(
            folders[0], tmp_path, tests=Dataset.from_list(PAIRS), trainer=trainer, padding_free=free, **changed,
            eval_strategy="steps", eval_steps=1,
        )  # fmt: skip
        shapes = watched(run)
        run.train()
        logs.append(run.state.log_history)
        tokens.append(shapes)
    assert len(logs[0]) == len(logs[1]) >= 4
    timed = ("runtime", "per_second", "flos")
    for padded, packed in zip(*logs, strict=True):
        assert padded.keys() == packed.keys()
        for key, value in padded.items():
            if not any(word in key for word in timed):
                assert packed[key] == pytest.approx(value, rel=1e-4, abs=1e-5), key
    padded, packed = (shapes[-1][0] * shapes[-1][1] for shapes in tokens)  # of the last evaluation's last batch
    assert packed < 0.8 * padded


def test_the_flag_stays_with_us(folders, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        run = ours(folders[0], tmp_path, padding_free=True)
    assert run.args.padding_free is True and run.padding_free is True
    assert not [record for record in caplog.records if "padding_free" in record.getMessage()]
    assert DPOConfig.padding_free is False  # still the default
    plain = ours(folders[0], tmp_path)
    assert plain.padding_free is False
    shapes = watched(plain)
    step(plain)
    assert shapes == [BATCH["input_ids"].shape]


@pytest.mark.slow
def test_a_copy_of_a_model_that_another_trainer_had(folders, tmp_path):
    """TRL's fused head runs the model that it was made for, in a copy too."""
    model = load(folders[0])
    add_fused_lm_head(model)
    reference = copy.deepcopy(model)
    reference.load_state_dict(load(folders[1]).state_dict())
    expected = step(build(DPOTrainer, load(folders[0]), tmp_path, trainer={"ref_model": load(folders[1])}))
    assert_equal_steps(expected, step(ours(model, tmp_path, padding_free=True, trainer={"ref_model": reference})))


@pytest.mark.parametrize("free", [False, True])
def test_a_copy_runs_its_own_weights(free, folders, tmp_path):
    run = ours(load(folders[0]), tmp_path, padding_free=free, trainer={"ref_model": load(folders[1])})
    other, ids = load(folders[1]), torch.tensor([[5, 6, 7]])
    copied = copy.deepcopy(run.model)
    copied.load_state_dict(other.state_dict())
    assert torch.equal(copied(ids).logits, other(ids).logits)
    assert torch.equal(run.model(ids).logits, load(folders[0])(ids).logits)


@pytest.mark.slow
def test_the_parents_collator_and_arguments(folders, tmp_path):
    """A plain DPOConfig and TRL's collator: what the sides have in common is read from their ids."""
    rows = [{"prompt": f"{i} and {i} is", "chosen": f" {2 * i}", "rejected": f" {i}{i}."} for i in range(1, 9)]
    logs = []
    for kind, free in ((DPOTrainer, False), (PerplexityDPOTrainer, True)):
        collator = DataCollatorForPreference(TOKENIZER.pad_token_id)
        run = build(
            kind, folders[0], tmp_path, rows=Dataset.from_list(rows), config=DPOConfig, padding_free=free,
            trainer={"data_collator": collator},
        )  # fmt: skip
        run.train()
        logs.append([log for log in run.state.log_history if "loss" in log])
    for theirs, own in zip(*logs, strict=True):
        for key, value in theirs.items():
            assert own[key] == pytest.approx(value, rel=1e-4, abs=1e-5), key


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.real_model
def test_a_real_model(real_model_path, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(real_model_path)
    rows = [
        {
            "prompt": [{"role": "user", "content": f"What is the capital of {country}? Answer in one word."}],
            "chosen": [{"role": "assistant", "content": city}],
            "rejected": [{"role": "assistant", "content": f"{city}, I think, but who am I to say?"}],
        }
        for country, city in (("France", "Paris"), ("the Federal Republic of Germany", "Berlin"))
    ]
    found = []
    for free in (False, True):
        policy, reference = load(real_model_path), load(real_model_path)
        with torch.no_grad():
            reference.model.layers[3].mlp.down_proj.weight.mul_(1.1)
        run = PerplexityDPOTrainer(
            policy, reference, PerplexityDPOConfig(**options(tmp_path, padding_free=free)),
            train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
        )  # fmt: skip
        batch = next(iter(run.get_train_dataloader()))
        run.model.train()
        run.model.requires_grad_(False).model.layers[0].requires_grad_(True)
        loss = run.compute_loss(run.model, batch)
        loss.backward()
        gradients = {name: p.grad for name, p in run.model.named_parameters() if p.grad is not None}
        found.append((loss.item(), gradients, dict(run._metrics["train"])))
    assert_equal_steps(*found)


# -- the proof ---------------------------------------------------------------------------------------------------------


def leaking(folder):
    """A model that takes packed rows for one document: it loses its mask."""
    model = load(folder)
    forward = model.model.forward

    def blind(attention_mask=None, position_ids=None, **kwargs):
        return forward(attention_mask=None if position_ids is not None else attention_mask, **kwargs)

    model.model.forward = blind
    return model


def test_a_model_that_leaks_is_refused_before_it_is_used(folders, tmp_path):
    run = ours(leaking(folders[0]), tmp_path, tests=Dataset.from_list(PAIRS), padding_free=True)
    for use in (run.train, run.evaluate):
        with pytest.raises(PackingLeakError, match="padding_free: log-probabilities of packed pairs"):
            use()
    with pytest.raises(PackingLeakError, match="packed pairs"):
        ours(leaking(folders[0]), tmp_path, padding_free=True, precompute_ref_log_probs=True)


def test_a_reference_that_leaks_is_refused(folders, tmp_path):
    run = ours(load(folders[0]), tmp_path, padding_free=True, trainer={"ref_model": leaking(folders[0])})
    with pytest.raises(PackingLeakError, match="packed pairs"):
        run.train()


def test_the_proof_is_made_once_and_counts_as_no_step(folders, tmp_path):
    run = ours(folders[0], tmp_path, padding_free=True)
    shapes = watched(run)
    step(run)
    first = len(shapes)
    step(run)
    assert len(shapes) == first + 1 and first > 2
    assert {len(values) for values in run._metrics["train"].values()} == {1, 2}  # `num_tokens` is one sum


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_learned_prompts_and_experts_are_refused(folders, tmp_path):
    prompts = {"peft_config": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)}
    with pytest.raises(ConfigError, match="padding_free: the model learns a prompt"):
        ours(folders[0], tmp_path, padding_free=True, trainer=prompts)
    rows = Dataset.from_list([{"prompt_ids": [5, 6], "chosen_ids": [7, 8], "rejected_ids": [9]}] * 4)
    sizes = {"output_router_logits": False, "vocab_size": len(TOKENIZER)}
    experts = {"padding_free": True, "rows": rows, "trainer": {"ref_model": mixtral(**sizes)}}
    with pytest.raises(ConfigError, match="router_aux_loss_coef=0 leaves it out"):
        ours(mixtral(**sizes), tmp_path, **experts)
    run = ours(mixtral(**sizes), tmp_path, **experts, router_aux_loss_coef=0.0)
    run.train()
    assert run.state.global_step == 2
