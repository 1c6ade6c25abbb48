"""The first steps of PPO, in which the critic learns alone: what moves, what does not, and what comes after."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig

from hf_objectives.errors import ConfigError
from hf_objectives.trainers.ppo_config import PPOConfig
from hf_objectives.trainers.ppo_warmup import CriticWarmup
from tests.support.ppo_worlds import ScriptedPPO, logged, ppo

SCRIPT = {"ask a": "b a <eos>", "ask b": "a a a <eos>", "ask c": "c <eos>", "ask d": "a b c d"}
ROWS = [{"prompt": prompt} for prompt in SCRIPT]
RUN = {
    "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "steps_per_generation": 2, "num_iterations": 2,
    "max_steps": 4, "learning_rate": 0.01, "beta": 0.1, "entropy_coef": 0.1, "weight_decay": 0.1,
    "lr_scheduler_type": "constant",
}  # fmt: skip


class Kept(ScriptedPPO):
    """Keeps the weights of policy and critic, and the policy's optimizer, after each step."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.kept = [self.parts()]

    def parts(self):
        weights = {f"critic.{name}": value for name, value in self.critic.state_dict().items()}
        return copy.deepcopy({**self.model.state_dict(), **weights})

    def training_step(self, *args, **kwargs):
        if self.state.global_step == len(self.kept):
            self.kept.append(self.parts())
        return super().training_step(*args, **kwargs)


def trained(folder, **options):
    run = ppo(folder, ROWS, kind=Kept, script=SCRIPT, **{**RUN, **options})
    run.train()
    run.kept.append(run.parts())
    return run


def moved(before: dict, after: dict) -> set[str]:
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_the_policy_rests_and_the_critic_learns_as_it_would(tmp_path, critic, lora):
    """In the first step a critic's gradient does not depend on whether the policy moves too."""
    adapters = LoraConfig(r=4, target_modules=["q_proj"]) if lora else None
    run = trained(tmp_path, critic=critic, critic_warmup_steps=2, peft_config=adapters)
    whole = trained(tmp_path, critic=critic, peft_config=adapters)
    assert len(run.kept) == len(whole.kept) == 5
    for before, after in zip(run.kept[:2], run.kept[1:3], strict=True):
        names = moved(before, after)
        assert names and all(name.startswith("critic.") for name in names), names
    own = {name for name in run.kept[0] if name.startswith("critic.")}
    assert own >= {"critic.head.weight", "critic.head.bias"} and len(own) == (2 if critic == "shared" else 13)
    for name in own:
        assert torch.allclose(run.kept[1][name], whole.kept[1][name], atol=1e-6), name
    for before, after in zip(run.kept[2:4], run.kept[3:5], strict=True):
        assert any(not name.startswith("critic.") for name in moved(before, after))
    # Adam counts the policy's own steps.
    counts = [int(state["step"]) for state in run.optimizer.state.values()]
    assert counts and {*counts} == {2}
    assert logged(run, "kl_per_answer") == [0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_all_steps_may_be_the_critics(tmp_path, critic):
    run = trained(tmp_path, critic=critic, critic_warmup_steps=9)
    assert {name for name in moved(run.kept[0], run.kept[4]) if not name.startswith("critic.")} == set()
    assert not run.optimizer.state
    assert logged(run, "grad_norm") == [0, 0, 0, 0] and logged(run, "clip_fraction") == [0, 0, 0, 0]
    losses = [run.args.vf_coef * value for value in logged(run, "value_loss")]
    assert logged(run, "loss") == pytest.approx(losses, abs=1e-4)  # the Trainer rounds it
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_an_adaptive_coefficient_waits(tmp_path):
    """A policy at rest is no nearer to the reference for a smaller coefficient."""
    run = trained(tmp_path, kl_target=1.0, kl_horizon=4, critic_warmup_steps=3, max_steps=8)
    betas = logged(run, "kl_coef")
    assert betas[:2] == [0.1, 0.1] and run.kl_control.coef < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_a_run_that_is_killed_in_the_warmup_goes_on(tmp_path, critic):
    options = {"critic": critic, "critic_warmup_steps": 3, "max_steps": 6}
    whole = trained(tmp_path, save_strategy="steps", save_steps=1, **options)
    for at in (1, 3):
        resumed = ppo(tmp_path / "resumed", ROWS, kind=ScriptedPPO, script=SCRIPT, **{**RUN, **options})
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{at}"))
        found = {**resumed.model.state_dict(), **{f"critic.{k}": v for k, v in resumed.critic.state_dict().items()}}
        assert moved(whole.kept[-1], found) == set(), at


def test_the_block_that_rests():
    warmup, weight = CriticWarmup(2), torch.ones(1, requires_grad=True)
    assert [warmup.covers(step) for step in (0, 1, 2)] == [True, True, False]
    with warmup.resting(True):
        assert warmup.in_pass and not (weight * 2).requires_grad
    with warmup.resting(False):
        assert not warmup.in_pass and (weight * 2).requires_grad
    with torch.no_grad(), warmup.resting(False):
        assert not (weight * 2).requires_grad
    with pytest.raises(ZeroDivisionError), warmup.resting(True):
        raise ZeroDivisionError
    assert not warmup.in_pass and torch.is_grad_enabled()


def test_settings_that_cannot_be(tmp_path):
    settings = {"use_cpu": True, "bf16": False}
    with pytest.raises(
        ConfigError, match="critic_warmup_steps is 3, and critic is 'none'; expected 0 without a critic"
    ):
        PPOConfig(str(tmp_path), critic="none", critic_warmup_steps=3, **settings)
    with pytest.raises(ConfigError, match="critic_warmup_steps is -1; expected 0 or more"):
        PPOConfig(str(tmp_path), critic_warmup_steps=-1, **settings)
