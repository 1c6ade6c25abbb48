"""Every kind of finding on a curve made by hand, and none on the same curve without the fault."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.signal import lfilter

from hf_objectives.diagnostics.detect import RULES, diagnose
from hf_objectives.errors import FileFormatError
from hf_objectives.inspection.findings import Finding

N = 300
T = np.arange(N)


def noisy(values, deviation=0.02, seed=0):
    return np.asarray(values, dtype=float) * (1 + deviation * np.random.default_rng(seed).standard_normal(len(values)))


def healthy_loss(seed=0):
    return noisy(2 + 4 * (1 + T / 5) ** -0.5, seed=seed)


def log(loss=None, *, epochs=1.0, eval_loss=None, **curves):
    lines = []
    loss = healthy_loss() if loss is None else loss
    for i, value in enumerate(loss):
        line = {"step": i + 1, "loss": float(value), "epoch": (i + 1) / len(loss) * epochs}
        lines.append(line | {key.replace("__", "/"): float(values[i]) for key, values in curves.items()})
    for k, value in enumerate([] if eval_loss is None else eval_loss):
        lines.append({"step": (k + 1) * len(loss) // len(eval_loss), "eval_loss": float(value)})
    return sorted(lines, key=lambda line: line["step"])


def kinds(history):
    return {one.kind: one for one in diagnose(history) if one.severity != "info"}


def test_a_healthy_run_has_no_finding():
    rate = 1e-3 * np.minimum((T + 1) / 20, 1 - T / N)
    norm = np.exp(0.2 * np.random.default_rng(1).standard_normal(N))
    falls = np.linspace(3, 2.5, 10)
    assert (
        diagnose(
            log(learning_rate=rate, grad_norm=norm, eval_loss=falls, num_supervised_tokens=T * 5, num_tokens_seen=T * 9)
        )
        == []
    )


def test_spike_recovered():
    loss = healthy_loss()
    loss[150:153] *= 2.5
    (found,) = kinds(log(loss)).values()
    assert (found.kind, found.step, found.last_step, found.severity) == ("spike_recovered", 151, 153, "warning")
    assert "before step 151" in found.evidence and "back after 3 logged steps" in found.evidence


def test_spike_sustained_names_what_else_happened_there():
    loss, norm = healthy_loss(), np.ones(N)
    loss[200:] *= 2
    norm[200] = 30
    found = kinds(log(loss, grad_norm=norm))["spike_sustained"]
    assert (found.step, found.last_step, found.severity) == (201, 300, "error")
    assert "gradient norm 30, usually 1" in found.evidence


def test_spike_at_a_resume_says_so():
    history = log()
    loss = healthy_loss()
    loss[200:] += 3
    again = [line for line in log(loss) if line["step"] > 200]
    found = kinds([line for line in history if line["step"] <= 230] + again)["spike_sustained"]
    assert found.step == 201 and "the run was resumed there" in found.evidence


def test_a_spike_at_the_very_end_is_not_judged():
    loss = healthy_loss()
    loss[-2:] *= 3
    assert [(one.kind, one.severity) for one in diagnose(log(loss))] == [("spike_recovered", "info")]


def test_plateau():
    found = kinds(log(noisy(2 + 3 * np.exp(-T / 5))))
    assert list(found) == ["plateau"] and 15 <= found["plateau"].step <= 121 and found["plateau"].last_step == 300


def test_a_plateau_with_correlated_noise():
    """Neighbours that go together make the blocks of a standing loss wander; that is no rise."""
    found = []
    for seed in range(45, 60):
        draws = np.random.default_rng(seed).standard_normal(N + 50)
        noise = lfilter([np.sqrt(1 - 0.8**2)], [1, -0.8], draws)[50:]
        found += kinds(log((3 + 0.8 * np.exp(-T / 8)) * (1 + 0.03 * noise)))
    assert set(found) == {"plateau"} and len(found) >= 5


@pytest.mark.parametrize(("start", "slope", "severity"), [(8.0, 0.0, "warning"), (3.0, 0.5, "error")])
def test_not_decreasing(start, slope, severity):
    found = kinds(log(noisy(start * (1 + slope * T / N))))
    assert list(found) == ["not_decreasing"] and found["not_decreasing"].severity == severity


@pytest.mark.parametrize(("start", "fall"), [(1.2, 0.0), (2.1, 0.0), (2.1, 0.015), (2.9, 0.01)])
def test_a_trained_model_with_little_to_learn_is_no_fault(start, fall):
    found = diagnose(log(noisy(start * (1 - fall * T / N))))
    assert all(one.severity == "info" for one in found)
    assert all("knew such text before, or nothing is trained" in one.evidence for one in found)


def test_the_first_steps_of_a_noisy_fine_tuning_are_no_spike():
    """Losses of a 135M model on real instructions, four rows a step; nothing is wrong."""
    first = [1.34, 2.38, 1.63, 1.97, 1.92, 1.66, 1.62, 2.21, 1.5, 1.85, 1.14, 1.31, 1.67, 1.65, 1.78, 1.76, 1.67, 1.54]
    rest = [1.77, 1.57, 1.94, 1.75, 1.69, 1.69, 1.77, 1.35, 1.42, 1.5, 2.14, 1.34, 2.05, 1.42, 1.65, 1.71, 1.47, 1.73]
    losses = first + rest
    for n in range(2, len(losses) + 1):
        assert not kinds([{"step": i + 1, "loss": loss} for i, loss in enumerate(losses[:n])]), n


def test_nothing_has_a_gradient():
    found = kinds(log(noisy(np.full(N, 2.5)), grad_norm=np.zeros(N)))["not_decreasing"]
    assert found.severity == "error" and found.evidence == "the gradient norm is exactly 0 at all of 300 logged steps"


def test_few_points_that_rise():
    rising = [2.0, 2.9, 3.1, 4.4, 6.0, 7.3, 9.0]
    assert kinds([{"step": 500 * i, "loss": x} for i, x in enumerate(rising)])["not_decreasing"].severity == "error"
    leaps = [1.7, 1.72, 1.69, 1.71, 1.68, 1.7, 1.73, 50.0, 51.0, 49.0, 50.5, 52.0, 50.0, 49.5, 51.5]
    assert "not_decreasing" in kinds([{"step": 500 * i, "loss": x} for i, x in enumerate(leaps)])
    assert not kinds([{"step": 500 * i, "loss": x} for i, x in enumerate(rising[::-1])])
    assert not kinds([{"step": 500 * i, "loss": x} for i, x in enumerate([2.0, 2.1, 1.9, 2.2, 2.0, 2.1, 2.15])])


@pytest.mark.parametrize("evaluation", [[1.5, 1.6, 2.0], [2.0, 1.5, 1.55, 1.7, 2.0]])
def test_few_evaluations_that_rise(evaluation):
    assert "overfitting" in kinds(log(eval_loss=evaluation))
    assert not kinds(log(eval_loss=[1.5, 1.51, 1.52]))


def test_several_evaluation_sets():
    history = log(epochs=5)
    for k, value in enumerate([3.0, 2.6, 2.3, 2.1, 2.0, 2.1, 2.3, 2.6, 2.9, 3.2]):
        history.append({"step": (k + 1) * 30, "eval_code_loss": value})
        history.append({"step": (k + 1) * 30, "eval_wiki_loss": 3 - 0.1 * k})
    found = kinds(history)
    assert list(found) == ["overfitting"] and found["overfitting"].evidence.startswith("eval_code_loss 2 at step 150")
    history[-1]["eval_wiki_loss"] = float("nan")
    assert kinds(history)["non_finite"].evidence.startswith("eval_wiki_loss is nan at step 300")


def test_a_slow_fall_in_heavy_noise_is_a_fall():
    assert not kinds(log(noisy(3 - 0.25 * T / N, deviation=0.05)))


def test_overfitting():
    evaluation = [3.0, 2.6, 2.3, 2.1, 2.0, 2.1, 2.3, 2.6, 2.9, 3.2]
    found = kinds(log(epochs=5, eval_loss=evaluation))
    assert (
        list(found) == ["overfitting"] and found["overfitting"].step == 150 and found["overfitting"].severity == "error"
    )
    assert "checkpoint of step 150" in found["overfitting"].advice
    assert not kinds(log(epochs=5, eval_loss=[3.0, 2.6, 2.3, 2.1, 2.0, 2.0, 2.01, 2.0, 2.01, 2.0]))


def test_overfitting_that_turns_sharply():
    evaluation = [3.798, 3.366, 2.701, 2.379, 2.257, 2.125, 2.294, 2.321, 2.533, 2.796]
    found = kinds(log(noisy(6 * 0.99**T), eval_loss=evaluation))["overfitting"]
    assert (found.step, found.last_step) == (180, 300)


@pytest.mark.parametrize("key", ["loss", "grad_norm"])
def test_non_finite(key):
    loss, norm = healthy_loss(), np.ones(N)
    (loss if key == "loss" else norm)[100:] = np.nan
    found = kinds(log(loss, grad_norm=norm))
    assert list(found) == ["non_finite"] and found["non_finite"].step == 101 and found["non_finite"].severity == "error"


def test_the_zero_that_a_nan_becomes():
    loss = healthy_loss()
    loss[100:] = 0
    (found,) = kinds(log(loss)).values()
    assert found.kind == "non_finite" and "logging_nan_inf_filter" in found.advice and found.step == 101


def test_one_skipped_step_of_a_loss_scaler_is_no_fault():
    norm = np.ones(N)
    norm[3] = np.inf
    assert [(one.kind, one.severity) for one in diagnose(log(grad_norm=norm))] == [("non_finite", "info")]


def test_gradient_explosion():
    norm = np.exp(0.2 * np.random.default_rng(1).standard_normal(N))
    norm[180:] *= 200
    found = kinds(log(grad_norm=norm))
    assert list(found) == ["gradient_explosion"] and found["gradient_explosion"].step == 181


def test_a_single_large_gradient():
    """Clipping takes care of it, unless the loss goes with it or it is out of all proportion."""
    norm, loss = np.exp(0.2 * np.random.default_rng(1).standard_normal(N)), healthy_loss()
    norm[180] *= 60
    assert [(one.kind, one.severity) for one in diagnose(log(grad_norm=norm))] == [("gradient_explosion", "info")]
    loss[181] *= 2
    assert kinds(log(loss, grad_norm=norm))["gradient_explosion"].severity == "warning"
    norm[180] *= 20
    assert kinds(log(grad_norm=norm))["gradient_explosion"].severity == "warning"


def test_many_spikes_are_told_once():
    loss = healthy_loss()
    loss[60::20] *= 2.5
    spikes = [one for one in diagnose(log(loss)) if one.kind == "spike_recovered" and one.severity == "warning"]
    assert len(spikes) == 1 and spikes[0].evidence.startswith("12 spikes, the first: ")
    assert (spikes[0].step, spikes[0].last_step) == (61, 281)


def test_restarts_whose_loss_answers_are_a_schedule():
    within = T % 75
    rate = 1e-3 * 0.5 * (1 + np.cos(np.pi * within / 75))
    loss = noisy((2 + 4 * (1 + T / 5) ** -0.5) * np.where((T >= 75) & (within < 15), 1.3, 1.0))
    found = [one for one in diagnose(log(loss, learning_rate=rate)) if one.kind == "schedule_fault"]
    assert [(one.severity, one.step, one.last_step) for one in found] == [("info", 76, 226)]
    assert "starts anew 3 times" in found[0].evidence


def test_a_loss_of_zero_from_the_first_step_on():
    """What a Trainer logs where every label is masked: no token, no gradient, nothing that looks wrong."""
    lines = [{"step": i + 1, "loss": 0.0, "grad_norm": 0.0} for i in range(40)]
    (found,) = diagnose(lines)
    assert (found.kind, found.severity) == ("few_supervised_tokens", "error")
    assert found.evidence == "the loss is exactly 0 at all of 40 logged steps, and so is the gradient norm"
    filtered = [{**line, "grad_norm": float("nan")} for line in lines]
    assert [one.kind for one in diagnose(filtered)] == ["non_finite"]


def test_what_breaks_together_is_told_together():
    loss, norm = healthy_loss(), np.ones(N)
    loss[200:], norm[200:] = np.nan, np.nan
    (found,) = [one for one in diagnose(log(loss, grad_norm=norm)) if one.kind == "non_finite"]
    assert found.evidence == "loss is nan at step 201 and at every one after it; so is grad_norm"


def test_a_rate_of_zero():
    rate = np.full(N, 1e-3)
    rate[200:] = 0
    found = kinds(log(learning_rate=rate))["schedule_fault"]
    assert (found.step, found.severity) == (201, "error") and "0 at 100 of 300 logged steps" in found.evidence
    rate[:] = 0
    assert kinds(log(learning_rate=rate))["schedule_fault"].evidence == "the learning rate is 0 at every step"


def test_a_rate_that_leaps():
    rate, loss = np.full(N, 1e-3), healthy_loss()
    rate[200:] = 2e-2
    assert [(one.kind, one.severity) for one in diagnose(log(learning_rate=rate))] == [("schedule_fault", "info")]
    loss[200:] *= 1.5
    found = kinds(log(loss, learning_rate=rate))
    assert found["schedule_fault"].step == 201 and "from 0.001 to 0.02" in found["schedule_fault"].evidence
    assert "the learning rate goes from 0.001 to 0.02" in found["spike_sustained"].evidence


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant", "restarts"])
def test_the_usual_schedules_do_not_leap(schedule):
    from torch import ones
    from torch.nn import Parameter
    from torch.optim import SGD
    from transformers import get_scheduler

    optimizer = SGD([Parameter(ones(1))], lr=1e-3)
    name = {"restarts": "cosine_with_restarts"}.get(schedule, schedule)
    made = get_scheduler(name, optimizer, num_warmup_steps=30, num_training_steps=N)
    rates = []
    for _ in range(N):
        rates.append(made.get_last_lr()[0])
        optimizer.step()
        made.step()
    assert not kinds(log(learning_rate=rates))


@pytest.mark.parametrize("shape", ["rises", "falls", "halves"])
def test_sawtooth(shape):
    phase = (T * 4 / N) % 1
    profile = {"rises": phase - 0.5, "falls": 0.5 - phase, "halves": np.where(phase < 0.5, 0.5, -0.5)}[shape]
    loss = healthy_loss()
    assert "sawtooth" not in kinds(log(loss, epochs=4))
    assert list(kinds(log(loss * (1 + 0.3 * profile), epochs=4))) == ["sawtooth"]


def test_epochs_that_are_learned_by_heart_are_no_sawtooth():
    stairs = 3 * 0.85 ** np.floor(T * 4 / N)
    assert "sawtooth" not in kinds(log(noisy(stairs), epochs=4))


def test_kto_is_no_policy_run():
    """It logs a kl beside the rewards of its pairs, and a loss that means something."""
    loss = np.full(N, 0.5) + 0.01 * np.random.default_rng(1).standard_normal(N)
    loss[150:] = 50
    curves = {"kl": np.full(N, 0.1), "rewards__chosen": np.linspace(0, 1, N), "rewards__margins": np.linspace(0, 1, N)}
    assert "spike_sustained" in kinds(log(loss, **curves))


def test_classifiers_and_evaluated_preferences_are_not_too_good():
    for key in ("eval_accuracy", "eval_f1", "eval_rewards/margins"):
        history = log(eval_loss=[0.5, 0.2, 0.05])
        history.append({"step": 300, key: 0.97})
        assert not kinds(history)


def test_too_good():
    loss = noisy(0.02 + 3 * np.exp(-T / 8))
    found = kinds(log(loss, epochs=1))
    assert list(found) == ["too_good"] and "of the first epoch" in found["too_good"].evidence
    assert not kinds(log(noisy(0.02 + 3 * np.exp(-T / 80)), epochs=8))  # by heart, after several epochs
    assert "evaluation loss 0.01" in kinds(log(eval_loss=[2.0, 1.0, 0.01]))["too_good"].evidence


def test_few_supervised_tokens():
    found = kinds(log(num_supervised_tokens=T * 3.0, num_tokens_seen=T * 1000.0))
    assert found["few_supervised_tokens"].evidence == "897 of 299,000 tokens are trained (0.30%)"


def test_mixture_drift():
    shares = {"mixture__web__share": np.linspace(0.7, 0.55, N), "mixture__web__asked": np.full(N, 0.7)}
    found = kinds(log(**shares))
    assert found["mixture_drift"].evidence == "source 'web': 55.0% given, 70.0% asked"
    late = 0.7 - 0.15 * np.maximum(T - 120, 0) / 180 + 0.002 * np.random.default_rng(0).standard_normal(N)
    drifts = kinds(log(mixture__web__share=late, mixture__web__asked=np.full(N, 0.7)))["mixture_drift"]
    assert abs(drifts.step - 121) <= 5
    assert not kinds(log(mixture__web__share=np.full(N, 0.701), mixture__web__asked=np.full(N, 0.7)))


def test_falling_chosen():
    curves = {"rewards__margins": np.linspace(0, 2, N), "logps__chosen": noisy(np.linspace(-100, -130, N))}
    loss = noisy(np.linspace(0.69, 0.4, N))
    assert list(kinds(log(loss, **curves))) == ["falling_chosen"]
    assert not kinds(log(loss, **{**curves, "logps__chosen": noisy(np.full(N, -100.0))}))


def policy(**changed):
    rise = 1 - np.exp(-T / 100)
    curves = {
        "reward": noisy(0.2 + rise),
        "kl": noisy(5 * rise + 0.1),
        "entropy": noisy(2 - rise),
        "completions__mean_length": noisy(100 + 20 * rise),
    }
    return log(0.01 * np.random.default_rng(4).standard_normal(N), **{**curves, **changed})


def test_a_policy_that_learns_has_no_finding():
    assert diagnose(policy()) == []


@pytest.mark.parametrize(
    ("kind", "changed"),
    [
        ("reward_hacking", {"kl": noisy(0.5 * np.exp(5 * (T / N) ** 2))}),
        ("entropy_collapse", {"entropy": noisy(np.where(T < 150, 2.0, 0.05))}),
        ("length_growth", {"completions__mean_length": noisy(100 + T), "completions__clipped_ratio": T / N}),
        ("length_growth", {"completions__mean_length": noisy(100 + T), "reward": noisy(np.full(N, 0.3))}),
    ],
)
def test_a_policy_that_runs_away(kind, changed):
    assert list(kinds(policy(**changed))) == [kind]


def test_answers_that_grow_with_their_reward_are_worth_knowing():
    (found,) = diagnose(policy(completions__mean_length=noisy(100 + T)))
    assert (found.kind, found.severity) == ("length_growth", "info") and "; reward 0." in found.evidence


def test_what_a_broken_run_does_afterwards_is_no_finding_of_its_own():
    loss = healthy_loss()
    loss[60:] = noisy(np.full(240, 7.0))
    assert list(kinds(log(loss))) == ["spike_sustained"]


def test_several_runs_are_named(tmp_path):
    for name, leap in (("a", 0), ("b", 3)):
        loss = healthy_loss()
        loss[200:] += leap
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, log(loss))))
    assert [(one.run, one.kind) for one in diagnose(tmp_path)] == [("b", "spike_sustained")]


def test_short_logs_say_nothing_and_one_point_is_refused():
    assert diagnose([{"step": i, "loss": 1.0} for i in (1, 2, 3)]) == []
    with pytest.raises(FileFormatError, match="one point is no curve"):
        diagnose([{"step": 1, "loss": 1.0}])


def test_a_run_that_has_just_begun_does_not_hide_the_others(tmp_path, caplog):
    loss = healthy_loss()
    loss[200:] += 3
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, log(loss))))
    (tmp_path / "b.jsonl").write_text(json.dumps({"step": 1, "loss": 2.0}))
    assert [(one.run, one.kind) for one in diagnose(tmp_path)] == [("a", "spike_sustained")]
    assert "b: one point is no curve" in caplog.text


def test_a_finding_says_its_steps():
    assert Finding("x", 5, "info", "", "").steps == "step 5"
    assert Finding("x", 5, "info", "", "", 1200).steps == "steps 5 to 1,200"
    assert Finding("x", 5, "info", "a", "b", 6, "r").to_dict() == {
        **{"kind": "x", "step": 5, "severity": "info", "evidence": "a", "advice": "b", "last_step": 6, "run": "r"}
    }


def test_every_rule_is_documented():
    assert all((case.__doc__ or "").strip() for rule in RULES for case in rule.cases)
