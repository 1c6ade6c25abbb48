"""The reference that a policy is held close to: the policy as it was given, whatever its folder holds."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from trl.trainer.utils import add_fused_lm_head

from hf_objectives import PPOConfig, PPOTrainer
from tests.support.ppo_worlds import LETTERS, SETTINGS, count_a, logged, ppo, small_model

LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_alpha=8)


@pytest.mark.slow
@pytest.mark.parametrize("sync", [False, True])
def test_the_reference_is_the_policy_as_given_and_not_its_folder(tmp_path, sync):
    small_model().save_pretrained(tmp_path / "saved")
    model = type(small_model()).from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        model.lm_head.weight.mul_(-3.0)
    given = {name: value.clone() for name, value in model.state_dict().items()}
    run = ppo(tmp_path, model=model, beta=0.1, learning_rate=1e-2, num_iterations=1, max_steps=3, sync_ref_model=sync,
              ref_model_sync_steps=2, ref_model_mixup_alpha=1.0)  # fmt: skip
    assert run.args.beta == run.beta == 0.1 and run.args.sync_ref_model is sync
    assert all(torch.equal(run.ref_model.state_dict()[name], value) for name, value in given.items())
    assert not any(parameter.requires_grad for parameter in run.ref_model.parameters()) and not run.ref_model.training
    run.train()
    assert logged(run, "kl")[0] == 0 and abs(logged(run, "kl")[1]) > 0
    same = [torch.equal(run.ref_model.state_dict()[name], value) for name, value in given.items()]
    assert not all(same) if sync else all(same)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["new", "trained"])
def test_under_adapters_the_reference_is_the_model_without_what_is_trained(tmp_path, kind):
    model = small_model()
    if kind == "trained":
        model = get_peft_model(model, LORA)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_()
    run = ppo(tmp_path, model=model, peft_config=LORA if kind == "new" else None, beta=0.1, learning_rate=0.1,
              num_iterations=1, max_steps=3)  # fmt: skip
    base = run.model.get_base_model().lm_head.weight.clone()
    assert run.ref_model is None
    run.train()
    kls = logged(run, "kl")
    assert kls[0] == 0 and abs(kls[1]) > 0
    assert torch.equal(run.model.get_base_model().lm_head.weight, base)


@pytest.mark.slow
def test_no_penalty_no_reference(tmp_path):
    run = ppo(tmp_path, beta=0.0)
    assert run.ref_model is None
    run.train()
    assert not logged(run, "kl") and not logged(run, "kl_coef")


def test_the_callers_arguments_are_restored_after_an_error(tmp_path):
    """They were left at beta=0, so that a second try trained without a penalty."""
    args = PPOConfig(str(tmp_path), **SETTINGS, beta=0.3, sync_ref_model=True, per_device_train_batch_size=4)
    with pytest.raises(ValueError, match="reward weights"):
        args.reward_weights = [1.0, 2.0]
        PPOTrainer(small_model(), count_a, args, train_dataset=[{"prompt": "ask a"}] * 4, processing_class=LETTERS)
    assert args.beta == 0.3 and args.sync_ref_model


def test_forwards_are_told_apart_by_the_model_and_not_by_their_order(tmp_path):
    """A parent that asks the reference first, as no release does yet, gives the same penalty."""
    ids, attention = torch.tensor([[2, 3, 4]]), torch.ones(1, 3, dtype=torch.long)
    for adapter in (None, LORA):
        run = ppo(tmp_path, model=small_model(), peft_config=adapter, beta=0.1)
        with torch.no_grad():
            for parameter in (p for p in run.model.parameters() if p.requires_grad):
                parameter.add_(0.5)
        if adapter is None:
            run.per_token(run.ref_model, ids, attention, 2)
        else:
            with run.model.disable_adapter():
                run.per_token(run.model, ids, attention, 2)
        run.per_token(run.model, ids, attention, 2)
        reference, policy = run.forwards["reference"].logps, run.forwards["policy"].logps
        logits = small_model()(ids).logits[0, :-1].log_softmax(-1)
        expected = logits.gather(-1, ids[0, 1:, None])[:, 0]
        assert torch.allclose(reference[0], expected, atol=1e-5) and not torch.allclose(policy, reference, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("mixed", [{}, {"bf16": True}])
def test_the_reference_of_a_second_run_is_not_the_policy(tmp_path, mixed):
    model = small_model()
    add_fused_lm_head(model, temperature=0.5)  # by another trainer of TRL, whose forward runs `model` in copies too
    for run in (1, 2):
        trained = ppo(tmp_path / str(run), model=model, beta=0.1, learning_rate=1e-2, num_iterations=1, **mixed)
        trained.train()
        kls = logged(trained, "kl")
        assert kls[0] == 0 and abs(kls[1]) > 1e-3
    ids, copied = LETTERS("ask a b", return_tensors="pt")["input_ids"], copy.deepcopy(model)
    with torch.no_grad():
        copied.lm_head.weight.zero_()
        assert not copied(ids).logits.any() and model(ids).logits.any()
    assert torch.equal(copied.generate(ids, max_new_tokens=1, do_sample=False)[0, -1:], torch.tensor([0]))
