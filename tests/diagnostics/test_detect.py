"""Every kind of finding on a curve made by hand, and none on the same curve without the fault."""

from __future__ import annotations

import json

import numpy as np
import pytest

from hf_objectives.diagnostics.detect import DETECTORS, diagnose
from hf_objectives.diagnostics.findings import Finding
from hf_objectives.errors import FileFormatError

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


@pytest.mark.parametrize(("slope", "severity"), [(0.0, "warning"), (0.5, "error")])
def test_not_decreasing(slope, severity):
    found = kinds(log(noisy(3 * (1 + slope * T / N))))
    assert list(found) == ["not_decreasing"] and found["not_decreasing"].severity == severity


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
        ("length_growth", {"completions__mean_length": noisy(100 + T)}),
    ],
)
def test_a_policy_that_runs_away(kind, changed):
    assert list(kinds(policy(**changed))) == [kind]


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


def test_a_finding_says_its_steps():
    assert Finding("x", 5, "info", "", "").steps == "step 5"
    assert Finding("x", 5, "info", "", "", 1200).steps == "steps 5 to 1,200"
    assert Finding("x", 5, "info", "a", "b", 6, "r").to_dict() == {
        **{"kind": "x", "step": 5, "severity": "info", "evidence": "a", "advice": "b", "last_step": 6, "run": "r"}
    }


def test_every_detector_is_documented():
    assert all((detector.__doc__ or "").strip() for detector in DETECTORS.values())
