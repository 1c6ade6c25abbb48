"""The end of the steps over a batch of answers on KL: which steps are left out, and what does not move in them."""

from __future__ import annotations

import copy

import pytest
import torch

from hf_objectives.errors import ConfigError
from hf_objectives.trainers.ppo_config import PPOConfig
from hf_objectives.trainers.ppo_stop import KLStop
from tests.support.ppo_worlds import ScriptedPPO, logged, ppo

SCRIPT = {"ask a": "b a <eos>", "ask b": "a a a <eos>", "ask c": "c <eos>", "ask d": "a b c d"}
ROWS = [{"prompt": prompt} for prompt in SCRIPT]
RUN = {
    "per_device_train_batch_size": 4, "num_iterations": 6, "max_steps": 12, "learning_rate": 0.02, "beta": 0.0,
    "lr_scheduler_type": "constant", "weight_decay": 0.1,
}  # fmt: skip


def test_by_hand():
    """Two micro-batches a step: 0.1 + 0.1 nats are not over 0.2, 0.1 + 0.2 are; then steps are left out until it begins."""
    stop = KLStop(0.2)
    found = []
    for nats in ((0.75, 1.0), (1.0, 2.0), (), ()):
        for one in nats:
            stop.add(torch.tensor(one), torch.tensor(10.0))
        stop.on_optimizer_step(None, None, None)
        found.append(stop.is_over)
    assert found == [False, True, True, True] and stop.take() == {"steps_skipped": 0.5} and stop.take() == {}
    stop.begin()
    assert not stop.is_over
    stop.add(torch.tensor(float("inf")), torch.tensor(10.0))
    stop.on_optimizer_step(None, None, None)
    assert stop.is_over and stop.take() == {"steps_skipped": 0.0}
    never = KLStop(None)
    never.add(torch.tensor(9.0), torch.tensor(1.0))
    never.on_optimizer_step(None, None, None)
    assert not never.is_over and never.take() == {}


class Kept(ScriptedPPO):
    """Keeps all that may move after each step, and counts forward passes over answers and batches of answers."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.kept, self.passes, self.batches = [], 0, 0

    def parts(self):
        optimizers = [self.optimizer, *([self.critic_optimizer.optimizer] if self.critic else [])]
        states = [value for one in optimizers for state in one.state.values() for value in state.values()]
        weights = [*self.model.parameters(), *(self.critic.parameters() if self.critic else [])]
        return [copy.deepcopy(value.detach()) for value in (*weights, *states)]

    def training_step(self, *args, **kwargs):
        if self.state.global_step > len(self.kept):
            self.kept.append(self.parts())
        return super().training_step(*args, **kwargs)

    def per_token(self, *args, **kwargs):
        self.passes += 1
        return super().per_token(*args, **kwargs)

    def answers_of_epoch(self, batches, epoch):
        self.batches += epoch == 0
        return super().answers_of_epoch(batches, epoch)


def trained(folder, checkpoint=None, **options):
    run = ppo(folder, ROWS, kind=Kept, script=SCRIPT, **{**RUN, **options})
    run.train(resume_from_checkpoint=checkpoint)
    run.kept.append(run.parts())
    return run


def same(one, other) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("critic", ["separate", "shared", "none"])
def test_steps_after_one_over_the_bound_are_left_out(tmp_path, critic):
    free = trained(tmp_path, critic=critic, max_steps=6)
    kls = logged(free, "approx_kl")
    assert kls[0] == 0 < kls[1] < kls[2] and "steps_skipped" not in free.state.log_history[0]
    run = trained(tmp_path, critic=critic, max_approx_kl=(kls[1] + kls[2]) / 2)
    # The third step is over the bound, and is taken.
    assert logged(run, "steps_skipped")[:6] == [0, 0, 0, 1, 1, 1] and run.batches == 2
    taken = [skipped == 0 for skipped in logged(run, "steps_skipped")]
    assert run.passes == sum(taken) and taken[6]
    assert [log["approx_kl"] for log in run.state.log_history if "approx_kl" in log][:3] == kls[:3]
    assert all(same(a, b) for a, b in zip(run.kept[:3], free.kept[:3], strict=True))
    for step in range(1, 12):
        assert same(run.kept[step - 1], run.kept[step]) is not taken[step], step
    assert [log["loss"] for log in run.state.log_history if "loss" in log][3:6] == [0, 0, 0]
    assert run.lr_scheduler.last_epoch == 12
    if critic != "none":
        assert run.critic_optimizer.scheduler.last_epoch == 12


@pytest.mark.slow
def test_micro_batches_and_minibatches_end_alike(tmp_path):
    """Of a step of two micro-batches all tokens count; a batch of two steps ends within an epoch."""
    bound = 1e-3
    whole = trained(tmp_path, max_approx_kl=bound)
    parts = trained(
        tmp_path,
        max_approx_kl=bound,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        steps_per_generation=4,
    )
    skipped = logged(whole, "steps_skipped")
    assert logged(parts, "steps_skipped") == skipped and 0 < sum(skipped) < 10
    assert logged(parts, "approx_kl") == pytest.approx(logged(whole, "approx_kl"), rel=1e-3, abs=1e-7)
    halves = trained(
        tmp_path, max_approx_kl=1e-9, per_device_train_batch_size=2, steps_per_generation=2, num_iterations=3,
        logging_steps=3,
    )  # fmt: skip
    # The first of two steps of an epoch has no KL, the second some: four of six are left out.
    assert logged(halves, "steps_skipped") == pytest.approx([1 / 3, 1, 1 / 3, 1])


@pytest.mark.slow
def test_a_run_that_is_killed_where_steps_are_left_out_goes_on(tmp_path):
    options = {"max_approx_kl": 1e-3, "eval_dataset": ROWS, "eval_strategy": "steps", "eval_steps": 1}
    whole = trained(tmp_path, save_strategy="steps", save_steps=1, **options)
    skipped = logged(whole, "steps_skipped")
    assert skipped[4] == skipped[10] == 1
    for at in (4, 5, 6):
        resumed = trained(tmp_path / "resumed", str(tmp_path / f"checkpoint-{at}"), **options)
        assert same(resumed.kept[-1], whole.kept[-1]), at
        assert logged(resumed, "steps_skipped") == skipped
    # An evaluation between two steps that are left out does not take their logs.
    logs = whole.state.log_history
    assert all("eval_steps_skipped" not in log for log in logs)
    assert len([log for log in logs if "eval_approx_kl" in log]) == 12
    assert all("eval_loss" not in log for log in logs if "steps_skipped" in log)


def test_settings_that_cannot_be(tmp_path):
    settings = {"use_cpu": True, "bf16": False}
    with pytest.raises(ConfigError, match="max_approx_kl is 0.0; expected more than 0"):
        PPOConfig(str(tmp_path), max_approx_kl=0.0, **settings)
    with pytest.raises(ConfigError, match="fp16 scales the gradient of every step, and max_approx_kl leaves steps out"):
        PPOConfig(str(tmp_path), max_approx_kl=0.1, critic="none", fp16=True, **settings)
