"""PPOTrainer: a step against plain loops, and what a checkpoint and a log hold."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from datasets import IterableDataset
from peft import LoraConfig

from hf_objectives.errors import ConfigError
from tests.support.ppo_loops import SCRIPT, Recorded, pairs, read
from tests.support.ppo_worlds import EOS, ScriptedPPO, count_a, logged, ppo, small_model

LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_alpha=8)


# -- a step by plain loops -------------------------------------------------------------------------------------------


def by_loops(old, new, reference, args) -> tuple[torch.Tensor, dict[str, float]]:
    """Loss and figures of one step from the papers' equations; `old` and `new` are policy and critic, then and now."""
    with torch.no_grad():
        then = read(*old, args.temperature)
        against = read(reference, None, args.temperature)
    k = {"k1": lambda x: x, "k3": lambda x: math.exp(-x) - 1 + x}[args.kl_estimator]
    advantages, returns, nats = [], [], []
    for (logps, _, values), (others, _, _), (_, answer) in zip(then, against, pairs(), strict=True):
        kl = [k(float(a) - float(b)) for a, b in zip(logps, others, strict=True)]
        low, high = args.reward_clip_range
        score = min(max(count_a([answer])[0], low), high) - (0 if answer[-1] == EOS else args.missing_eos_penalty)
        rewards = [-args.beta * one for one in kl]
        rewards[-1] += score
        value, own, following = [*map(float, values), 0.0], [], 0.0
        for t in reversed(range(len(answer))):
            following = rewards[t] + args.gamma * value[t + 1] - value[t] + args.gamma * args.lam * following
            own.insert(0, following)
        advantages.append(own)
        returns.append([a + v for a, v in zip(own, value, strict=False)])
        nats.append(sum(kl))
    flat = torch.tensor([a for own in advantages for a in own], dtype=torch.float64)
    now, total = read(*new, args.temperature), len(flat)
    loss, sums = torch.zeros(()), dict.fromkeys(("policy_loss", "value_loss", "entropy", "clip_fraction"), 0.0)
    for i, (logps, entropies, values) in enumerate(now):
        for t in range(len(logps)):
            advantage = (advantages[i][t] - flat.mean()) / (flat.var(correction=0) + 1e-8).sqrt()
            ratio = (logps[t] - then[i][0][t]).exp()
            held = ratio.clamp(1 - args.epsilon, 1 + args.epsilon_high)
            policy = -torch.minimum(ratio * advantage, held * advantage)
            was = then[i][2][t]
            value = (values[t] - returns[i][t]) ** 2
            clipped = (was + (values[t] - was).clamp(-args.cliprange_value, args.cliprange_value) - returns[i][t]) ** 2
            value = torch.maximum(value, clipped) / 2 if args.critic != "none" else torch.zeros(())
            loss = loss + policy + args.vf_coef * value - args.entropy_coef * entropies[t]
            parts = (policy, value, entropies[t], (held * advantage < ratio * advantage).float())
            sums = {name: sums[name] + float(part.detach()) / total for name, part in zip(sums, parts, strict=True)}
    return loss / total, {**sums, "kl_per_answer": sum(nats) / len(nats), "kl": sum(nats) / total}


@pytest.mark.slow
@pytest.mark.parametrize(("critic", "estimator"), [("none", "k1"), ("separate", "k1"), ("shared", "k3")])
@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
def test_loss_and_gradients_of_a_step_are_those_of_plain_loops(tmp_path, critic, estimator, lora):
    """The second step on the same answers, so that ratios and values have moved; four uneven micro-batches."""
    run = ppo(
        tmp_path, [{"prompt": prompt} for prompt in SCRIPT], kind=Recorded, script=SCRIPT, critic=critic,
        kl_estimator=estimator, peft_config=LORA if lora else None, per_device_train_batch_size=2,
        gradient_accumulation_steps=4, steps_per_generation=4, num_iterations=2, learning_rate=0.02, max_grad_norm=0.0,
        beta=0.3, gamma=0.9, lam=0.8, epsilon=0.01, epsilon_high=0.02, cliprange_value=0.02, vf_coef=0.5, entropy_coef=0.03,
        missing_eos_penalty=0.5, reward_clip_range=(-1.0, 2.5), temperature=0.7,
    )  # fmt: skip
    torch.manual_seed(5)
    with torch.no_grad():  # away from the reference, which has been made by now
        for name, parameter in run.model.named_parameters():
            if not lora or "lora_B" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape))
        if run.critic is not None:
            run.critic.head.weight.normal_()
    run.train()
    reference = copy.deepcopy(run.model).unload() if lora else small_model()
    old, new = [tuple(one and one.double() for one in both) for both in run.before]
    assert not all(torch.equal(a, b) for a, b in zip(old[0].parameters(), new[0].parameters(), strict=True))
    loss, figures = by_loops(old, new, reference.double(), run.args)
    loss.backward()
    first, last = [log for log in run.state.log_history if "policy_loss" in log]
    assert last["loss"] == pytest.approx(float(loss.detach()), abs=1e-4)  # the Trainer rounds it
    assert 0 < figures["clip_fraction"] < 1
    for name in ("policy_loss", "value_loss", "entropy", "clip_fraction"):
        assert last[name] == pytest.approx(figures[name], abs=1e-5), name
    for name in ("kl", "kl_per_answer") if estimator == "k1" else ("kl_per_answer",):  # kl is k1 whatever the penalty
        assert first[name] == pytest.approx(figures[name], abs=1e-5), name
    expected = {name: p.grad for name, p in new[0].named_parameters() if p.requires_grad}
    if critic != "none":
        expected |= {f"critic.{name}": p.grad for name, p in new[1].named_parameters()}
    assert set(run.gradients[1]) == set(expected)
    scale = max(float(g.abs().max()) for g in expected.values())
    for name, value in expected.items():
        assert torch.allclose(run.gradients[1][name].double(), value, atol=1e-5 * scale), name


@pytest.mark.slow
def test_ratios_begin_at_one(tmp_path):
    run = ppo(tmp_path, beta=0.1, critic="shared", learning_rate=1e-2, num_iterations=2)
    run.train()
    assert logged(run, "approx_kl")[0] == pytest.approx(0, abs=1e-9) and logged(run, "approx_kl")[1] > 0
    assert logged(run, "clip_fraction")[0] == 0


# -- checkpoints -----------------------------------------------------------------------------------------------------

RUN = {
    "per_device_train_batch_size": 2, "steps_per_generation": 2, "num_iterations": 2, "max_steps": 14, "learning_rate": 1e-2,
    "beta": 0.1, "kl_target": 0.05, "kl_horizon": 64, "save_strategy": "steps", "save_steps": 1, "warmup_steps": 2,
}  # fmt: skip
TIMES = ("step_time", "runtime", "per_second", "total_flos", "train_loss")


def state_of(run) -> dict[str, torch.Tensor]:
    critic = run.critic.state_dict() if run.critic is not None else {}
    return {**run.model.state_dict(), **{f"critic.{name}": value for name, value in critic.items()}}


def logs_of(run) -> list[dict]:
    return [
        {key: value for key, value in log.items() if not any(word in key for word in TIMES)}
        for log in run.state.log_history
    ]


def rows_of_letters() -> list[dict]:
    return [{"prompt": prompt} for prompt in SCRIPT]


@pytest.mark.slow
@pytest.mark.parametrize("critic", ["separate", "shared", "none"])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path, critic):
    """From a new batch of answers (4), from within one (3, 5), and from within the second epoch (8 begins it)."""
    whole = ppo(tmp_path / "whole", rows_of_letters(), critic=critic, **RUN)
    whole.train()
    assert whole.state.epoch > 1.5
    for at in (3, 4, 8, 9) if critic == "separate" else (5,):
        torch.manual_seed(99)
        resumed = ppo(tmp_path / "resumed", rows_of_letters(), critic=critic, **{**RUN, "save_strategy": "no"})
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{at}"))
        assert logs_of(resumed) == logs_of(whole), at
        for name, value in state_of(whole).items():
            assert torch.equal(state_of(resumed)[name], value), (at, name)
        assert resumed.kl_control.coef == whole.kl_control.coef != 0.1


@pytest.mark.slow
def test_adapters_and_a_reference_that_moves_resume_too(tmp_path):
    for name, options in {
        "lora": {"peft_config": LORA},
        "sync": {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.5},
    }.items():
        whole = ppo(tmp_path / name, rows_of_letters(), **{**RUN, "max_steps": 8}, **options)
        whole.train()
        resumed = ppo(
            tmp_path / "resumed", rows_of_letters(), **{**RUN, "max_steps": 8, "save_strategy": "no"}, **options
        )
        resumed.train(resume_from_checkpoint=str(tmp_path / name / "checkpoint-3"))
        assert logs_of(resumed) == logs_of(whole), name
        assert all(torch.equal(state_of(resumed)[key], value) for key, value in state_of(whole).items()), name


@pytest.mark.slow
def test_a_checkpoint_holds_policy_critic_and_both_optimizers(tmp_path):
    run = ppo(tmp_path, **{**RUN, "max_steps": 2, "save_steps": 2})
    run.train()
    folder = Path(tmp_path) / "checkpoint-2"
    assert {"model.safetensors", "optimizer.pt", "critic.pt", "ppo_state_rank_0.pt"} <= {
        path.name for path in folder.iterdir()
    }
    state = torch.load(folder / "critic.pt", weights_only=True)
    for name, value in run.critic.state_dict().items():
        assert torch.equal(state["critic"][name], value)
    assert (
        len(state["optimizer"]["state"]) == len(list(run.critic.parameters())) and state["scheduler"]["last_epoch"] == 2
    )


@pytest.mark.slow
def test_checkpoints_that_cannot_go_on(tmp_path):
    run = ppo(tmp_path, **{**RUN, "critic": "none", "max_steps": 2})
    run.train()
    resumed = ppo(tmp_path, **{**RUN, "max_steps": 4})
    with pytest.raises(ConfigError, match=r"has no critic\.pt"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    folder = tmp_path / "checkpoint-2"
    (folder / "ppo_state_rank_0.pt").unlink()
    with pytest.raises(ConfigError, match=r"ppo_state_rank_0\.pt is missing"):
        ppo(tmp_path, **{**RUN, "critic": "none"}).train(resume_from_checkpoint=str(folder))
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["files"]["ppo_state_rank_0.pt"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match=r"has no ppo_state_rank_0\.pt; it was saved by another trainer"):
        ppo(tmp_path, **{**RUN, "critic": "none"}).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


# -- logs ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_is_logged(tmp_path, capsys):
    texts = [{"text": "a b c d"}, {"text": "ask e"}]
    run = ppo(
        tmp_path, rows_of_letters(), beta=0.1, max_steps=4, learning_rate=0.02, num_iterations=2, log_completions=True,
        eval_lm_datasets={"plain": texts}, eval_dataset=rows_of_letters(), eval_strategy="steps", eval_steps=3,
        logging_steps=2, per_device_eval_batch_size=4,
    )  # fmt: skip
    run.train()
    trained = [log for log in run.state.log_history if "policy_loss" in log]
    evaluated = [log for log in run.state.log_history if "eval_policy_loss" in log]
    assert [log["step"] for log in trained] == [2, 4] and [log["step"] for log in evaluated] == [3, 4]
    names = {
        *("reward", "kl", "kl_per_answer", "kl_coef", "entropy", "clip_fraction", "approx_kl", "value_loss"),
        *("value_clip_fraction", "explained_variance", "completions/mean_length", "completions/finished"),
        *("rewards/missing", "rewards/failed", "rewards/count_a/mean", "grad_norm", "learning_rate"),
    }
    assert all(names <= log.keys() for log in trained)
    assert {f"eval_{name}" for name in names - {"grad_norm", "learning_rate"}} <= evaluated[0].keys()
    plain = [log["step"] for log in run.state.log_history if "eval_plain_perplexity" in log]
    assert plain == [0, 3, 4]
    assert {log["eval_plain_perplexity_increase"] for log in run.state.log_history if log.get("step") == 0} >= {0.0}
    shown = capsys.readouterr().out
    assert "Completion" in shown and "Advantage" in shown and "ask" in shown


@pytest.mark.slow
def test_figures_of_an_evaluation_do_not_mix_with_those_of_steps(tmp_path):
    """Evaluation between two logs: what is logged of the steps is what it is without."""

    def losses(**options) -> list[float]:
        run = ppo(
            tmp_path, rows_of_letters(), kind=ScriptedPPO, script=SCRIPT, max_steps=4, logging_steps=4, learning_rate=0.02,
            eval_dataset=rows_of_letters()[:4], per_device_eval_batch_size=4, **options,
        )  # fmt: skip
        run.train()
        return [logged(run, name)[0] for name in ("policy_loss", "value_loss", "explained_variance", "entropy")]

    assert losses(eval_strategy="steps", eval_steps=1) == losses()


@pytest.mark.slow
def test_the_table_shows_mean_advantages(tmp_path):
    run = ppo(
        tmp_path, [{"prompt": prompt} for prompt in SCRIPT], kind=ScriptedPPO, script=SCRIPT, critic="none", beta=0.0,
        lam=1.0, gamma=1.0, whiten_advantages=False, per_device_train_batch_size=8, max_steps=1,
    )  # fmt: skip
    run.train()
    shown = dict(zip(run._logs["prompt"], run._logs["advantages"], strict=True))
    assert shown == {prompt: float(answer.split().count("a")) for prompt, answer in SCRIPT.items()}


# -- ways to run -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_activation_checkpointing_changes_nothing(tmp_path, critic):
    def trained(**options):
        run = ppo(
            tmp_path, rows_of_letters(), kind=ScriptedPPO, script=SCRIPT, critic=critic, beta=0.1, max_steps=3, optim="sgd",
            learning_rate=0.1, per_device_train_batch_size=8, model=small_model(num_hidden_layers=2), **options,
        )  # fmt: skip
        run.train()
        return run

    plain, checkpointed = trained(), trained(gradient_checkpointing=True)
    if critic == "separate":
        assert checkpointed.critic.backbone.is_gradient_checkpointing and checkpointed.critic.backbone.training
    for name, value in state_of(plain).items():
        assert torch.allclose(state_of(checkpointed)[name], value, atol=1e-6), name


@pytest.mark.slow
def test_a_stream_and_half_precision(tmp_path):
    stream = IterableDataset.from_generator(lambda: iter(rows_of_letters()))
    run = ppo(tmp_path, stream, beta=0.1, bf16=True, max_steps=4, num_iterations=2, learning_rate=1e-2)
    run.train()
    assert run.state.global_step == 4 and all(value.dtype == torch.float32 for value in state_of(run).values())
    assert run._buffered_inputs[0]["values"].dtype == torch.float32
    assert all(math.isfinite(value) for value in logged(run, "loss"))


def test_evaluation_of_several_sets(tmp_path):
    run = ppo(
        tmp_path,
        eval_dataset={"one": rows_of_letters()[:4], "two": rows_of_letters()[4:]},
        per_device_eval_batch_size=2,
    )
    metrics = run.evaluate()
    assert {"eval_one_loss", "eval_two_loss"} <= metrics.keys()
    for name in ("one", "two"):  # TRL calls both `eval_`
        assert len(logged(run, f"eval_{name}_reward")) == len(logged(run, f"eval_{name}_policy_loss")) == 1


@pytest.mark.slow
def test_a_ppo_checkpoint_without_its_critic_is_passed_over(tmp_path, caplog):
    """Also one that was made before checkpoints had a manifest."""
    run = ppo(tmp_path, rows_of_letters(), **{**RUN, "max_steps": 4})
    run.train()
    for step, name in ((4, "critic.pt"), (3, "ppo_state_rank_0.pt")):
        for file in (name, "manifest.json"):
            (tmp_path / f"checkpoint-{step}" / file).unlink()
    resumed = ppo(tmp_path, rows_of_letters(), **{**RUN, "max_steps": 4})
    resumed.train(resume_from_checkpoint=True)
    assert "checkpoint-4 (critic.pt is missing); checkpoint-3 (ppo_state_rank_0.pt is missing)" in caplog.text
    assert logs_of(resumed) == logs_of(run)
