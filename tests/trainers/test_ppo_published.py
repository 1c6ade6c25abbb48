"""PPO against the arithmetic of TRL's PPOTrainer (removed after 0.2x), written out: the same answers, loss and first step."""

from __future__ import annotations

import math

import pytest
import torch

from hf_objectives.trainers.ppo_config import PPOConfig
from tests.support.ppo_loops import SCRIPT, Recorded, pairs, read
from tests.support.ppo_worlds import count_a, ppo, small_model

#: Its defaults: the coefficient of the KL, k1, in the reward; gamma and lambda; the clips; the weight of the value loss.
KL_COEF, GAMMA, LAM, CLIP, CLIP_VALUE, VF_COEF = 0.05, 1.0, 0.95, 0.2, 0.2, 0.1


def published(old, new, reference, *, bessel: bool = False) -> dict[str, torch.Tensor]:
    """Losses of a batch by the published formulas, token by token; `old` and `new` are policy and critic, then and now.

    With `bessel` the variance that whitens is divided by n - 1, as in TRL's `masked_whiten`.
    """
    with torch.no_grad():
        then, against = read(*old, 1.0), read(reference, None, 1.0)
    advantages, returns = [], []
    for (logps, _, values), (others, _, _), (_, answer) in zip(then, against, pairs(), strict=True):
        rewards = [-KL_COEF * (float(a) - float(b)) for a, b in zip(logps, others, strict=True)]
        rewards[-1] += count_a([answer])[0]
        last, own = 0.0, []
        for t in reversed(range(len(answer))):
            following = float(values[t + 1]) if t + 1 < len(answer) else 0.0
            delta = rewards[t] + GAMMA * following - float(values[t])
            last = delta + GAMMA * LAM * last
            own.insert(0, last)
        advantages.append(own)
        returns.append([a + float(v) for a, v in zip(own, values, strict=True)])
    flat = [one for own in advantages for one in own]
    n, mean = len(flat), sum(flat) / len(flat)
    variance = sum((one - mean) ** 2 for one in flat) / (n - 1 if bessel else n)
    policy = value = torch.zeros((), dtype=torch.float64)
    for i, (logps, _, values) in enumerate(read(*new, 1.0)):
        for t, logp in enumerate(logps):
            advantage = (advantages[i][t] - mean) / math.sqrt(variance + 1e-8)
            ratio = torch.exp(logp - then[i][0][t])
            policy = policy + torch.max(-advantage * ratio, -advantage * torch.clamp(ratio, 1 - CLIP, 1 + CLIP))
            was = then[i][2][t]
            clipped = torch.clamp(values[t], was - CLIP_VALUE, was + CLIP_VALUE)
            value = value + 0.5 * torch.max((values[t] - returns[i][t]) ** 2, (clipped - returns[i][t]) ** 2)
    return {"policy": policy / n, "value": value / n, "tokens": torch.tensor(n)}


def gradients(losses, policy, critic, weight: float = VF_COEF) -> dict[str, torch.Tensor]:
    named = {**dict(policy.named_parameters()), **dict(critic.named_parameters("critic"))}
    found = torch.autograd.grad(losses["policy"] + weight * losses["value"], list(named.values()))
    return dict(zip(named, found, strict=True))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two epochs over one batch of eight answers, in one micro-batch; TRL clips no gradient there."""
    made = ppo(
        tmp_path_factory.mktemp("run"), [{"prompt": prompt} for prompt in SCRIPT], kind=Recorded, script=SCRIPT,
        per_device_train_batch_size=8, num_iterations=2, max_steps=2, learning_rate=0.02, max_grad_norm=0.0,
        lr_scheduler_type="constant", weight_decay=0.1,
    )  # fmt: skip
    torch.manual_seed(5)
    with torch.no_grad():  # away from the reference, which has been made by now
        for parameter in made.model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
        made.critic.head.weight.normal_()
    made.train()
    made.states = [tuple(one.double() for one in both) for both in made.before]
    return made


def test_the_defaults_are_the_published_ones(tmp_path):
    args = PPOConfig(str(tmp_path), use_cpu=True, bf16=False)
    found = (args.beta, args.gamma, args.lam, args.epsilon, args.cliprange_value, args.vf_coef)
    assert found == (KL_COEF, GAMMA, LAM, CLIP, CLIP_VALUE, VF_COEF)
    assert args.num_iterations == 4 and args.kl_estimator == "k1" and args.whiten_advantages and not args.whiten_rewards


@pytest.mark.slow
@pytest.mark.parametrize("step", [0, 1])
def test_losses_and_gradients(run, step):
    """At first, where every ratio is 1, and after a step, where ratios and values are clipped."""
    losses = published(run.states[0], run.states[step], small_model().double())
    log = [log for log in run.state.log_history if "policy_loss" in log][step]
    assert log["policy_loss"] == pytest.approx(float(losses["policy"].detach()), abs=1e-6)
    assert log["value_loss"] == pytest.approx(float(losses["value"].detach()), rel=1e-5)
    assert (log["clip_fraction"] > 0.1 and log["value_clip_fraction"] > 0.1) is (step == 1)
    expected = gradients(losses, *run.states[step])
    assert set(run.gradients[step]) == set(expected)
    scale = max(float(one.abs().max()) for one in expected.values())
    for name, one in expected.items():
        assert torch.allclose(run.gradients[step][name].double(), one, atol=1e-5 * scale), name


@pytest.mark.slow
def test_the_first_step_of_adam(run):
    """Of moments that begin at 0 the first step is lr g / (|g| + eps), after weights have decayed; norms do not."""
    rate, decay, eps = 0.02, 0.1, 1e-5
    expected = gradients(published(run.states[0], run.states[0], small_model().double()), *run.states[0])
    before, after = (
        {**dict(policy.named_parameters()), **dict(critic.named_parameters("critic"))} for policy, critic in run.states
    )
    for name, gradient in expected.items():
        kept = 1 if "norm" in name or "bias" in name else 1 - rate * decay
        hand = before[name].detach() * kept - rate * gradient / (gradient.abs() + eps)
        assert torch.allclose(after[name].detach(), hand, atol=1e-2 * rate), name


@pytest.mark.slow
def test_where_the_variance_differs(run):
    """TRL divides it by n - 1. At the first step the policy's gradients are ours times the root of (n - 1) / n."""
    reference, (policy, critic) = small_model().double(), run.states[0]
    ours = gradients(published((policy, critic), (policy, critic), reference), policy, critic, 0.0)
    losses = published((policy, critic), (policy, critic), reference, bessel=True)
    theirs, n = gradients(losses, policy, critic, 0.0), int(losses["tokens"])
    factor = math.sqrt((n - 1) / n)
    assert n == 22 and factor < 0.98
    for name, _ in policy.named_parameters():
        assert torch.allclose(theirs[name], factor * ours[name], rtol=1e-4, atol=1e-6), name
