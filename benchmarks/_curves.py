"""Generated training logs for benchmarks/diagnosis.py: runs as they look when they are healthy, and one fault in each of the
others. A fault has a size, drawn from what a user would want to be told of; SIZES are given ones, smaller ones among them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass
class Case:
    """A log with what is to be found in it.

    Attributes:
        expected: kinds of which one has to be found; empty for a healthy run.
        allowed: kinds that may be found as well, as consequences of the fault.
        step: where the fault begins; None where it is in the whole run.
    """

    name: str
    log: list[dict[str, Any]]
    expected: tuple[str, ...] = ()
    allowed: tuple[str, ...] = ()
    step: int | None = None


@dataclass
class Run:
    """A run under construction; arrays have one value per logged step."""

    rng: np.random.Generator
    n: int
    every: int
    epochs: float
    loss: np.ndarray
    level: np.ndarray
    rate: np.ndarray
    norm: np.ndarray
    evaluation: np.ndarray | None
    at: np.ndarray
    extra: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def time(self) -> np.ndarray:
        """Share of the run that is done, from 0 to 1."""
        return np.arange(self.n) / self.n

    def step(self, i: int) -> int:
        """The optimizer step of the i-th logged line."""
        return (i + 1) * self.every

    def log(self) -> list[dict[str, Any]]:
        """As a Trainer's log_history."""
        lines = []
        evaluated = dict(
            zip(self.at.tolist(), [] if self.evaluation is None else self.evaluation.tolist(), strict=False)
        )
        for i in range(self.n):
            line = {
                "step": self.step(i),
                "epoch": (i + 1) / self.n * self.epochs,
                "loss": float(self.loss[i]),
                "learning_rate": float(self.rate[i]),
                "grad_norm": float(self.norm[i]),
            }
            lines.append({**line, **{key: float(values[i]) for key, values in self.extra.items()}})
            if i in evaluated:
                lines.append({"step": self.step(i), "epoch": line["epoch"], "eval_loss": evaluated[i]})
        return lines


def noise_of(rng: np.random.Generator, n: int, deviation: float) -> np.ndarray:
    """Batch noise: normal or with heavier tails, independent or a little correlated."""
    draws = rng.standard_normal(n) if rng.random() < 0.6 else rng.standard_t(6, n) / np.sqrt(1.5)
    correlation = rng.choice([0.0, 0.0, 0.2, 0.4])
    for i in range(1, n):
        draws[i] = correlation * draws[i - 1] + np.sqrt(1 - correlation**2) * draws[i]
    return draws * deviation


def schedule_of(rng: np.random.Generator, n: int) -> np.ndarray:
    """A learning rate: warmup, then constant, linear, cosine, or constant with a decay at the end."""
    peak = 10 ** rng.uniform(-5, -2.5)
    warm = int(n * rng.choice([0, 0.02, 0.05, 0.1]))
    x = np.clip((np.arange(n) - warm) / max(1, n - warm), 0, 1)
    kind = rng.integers(4)
    rest = [np.ones(n), 1 - x, 0.5 * (1 + np.cos(np.pi * x)), np.clip((1 - x) / 0.2, 0, 1)][kind]
    ramp = np.minimum(1.0, (np.arange(n) + 1) / max(1, warm))
    return peak * rest * ramp


def level_of(rng: np.random.Generator, n: int, epochs: float, *, stairs: bool = True) -> np.ndarray:
    """The loss without noise: pretraining's power law, fine-tuning's quick start, a start that is low and flat already, or
    steps down where memorised epochs begin."""
    t = np.arange(n) / n
    kind = rng.choice(["power", "quick", "flat", "stairs"] if stairs else ["power", "quick", "flat"])
    if kind == "power":
        low, span = rng.uniform(1.5, 3), rng.uniform(3, 7)
        start = rng.uniform(0.005, 0.05)
        return low + span * (1 + t / start) ** -rng.uniform(0.35, 0.9)
    start = rng.uniform(1.0, 3.0)
    if kind == "quick":
        quick, slow = rng.uniform(0.05, 0.25), rng.uniform(0.08, 0.3)
        return start * (1 - quick * (1 - np.exp(-t / rng.uniform(0.03, 0.1))) - slow * np.log1p(9 * t) / np.log(10))
    if kind == "flat":
        return start * (1 - rng.uniform(0.05, 0.15) * np.log1p(9 * t) / np.log(10))
    whole = np.floor(t * epochs)
    return start * (1 - 0.1 * np.log1p(9 * t) / np.log(10)) * (1 - rng.uniform(0.05, 0.15)) ** whole


def healthy(
    rng: np.random.Generator,
    *,
    epochs: float | None = None,
    points: tuple[int, int] = (60, 2500),
    stairs: bool = True,
) -> Run:
    """A run with nothing wrong."""
    n = int(np.exp(rng.uniform(*np.log(points))))
    epochs = float(rng.choice([0.5, 1, 2, 3, 4])) if epochs is None else epochs
    level = level_of(rng, n, epochs, stairs=stairs)
    every = int(rng.choice([1, 5, 10, 50]))
    deviation = rng.uniform(0.008, 0.05)
    loss = level * (1 + noise_of(rng, n, deviation))
    norm = (
        np.exp(noise_of(rng, n, rng.uniform(0.1, 0.35)))
        * rng.uniform(0.2, 2)
        * (1 + 4 * np.exp(-np.arange(n) / (0.03 * n)))
    )
    at, evaluation = np.zeros(0, int), None
    if rng.random() < 0.7:
        at = np.unique(np.linspace(0, n - 1, int(rng.integers(5, 30)) + 1).astype(int)[1:])
        evaluation = level[at] * rng.uniform(0.98, 1.1) * (1 + rng.normal(0, rng.uniform(0.001, 0.006), len(at)))
    return Run(rng, n, every, epochs, loss, level, schedule_of(rng, n), norm, evaluation, at)


def _set_level(run: Run, level: np.ndarray, *, evaluation: bool = True) -> None:
    run.loss = run.loss / run.level * level
    if run.evaluation is not None and evaluation:
        run.evaluation = run.evaluation / run.level[run.at] * level[run.at]
    run.level = level


# Each fault is a function of a random generator and, where it has one, of its size; without a size it is drawn.


def plateau(rng: np.random.Generator) -> Case:
    run = healthy(rng, points=(100, 2500))
    start, share = rng.uniform(1.5, 9), rng.uniform(0.15, 0.7)
    _set_level(run, start * (1 - share * (1 - np.exp(-run.time / rng.uniform(0.01, 0.07)))))
    return Case("", run.log(), ("plateau",))


def not_decreasing(rng: np.random.Generator, size: float | None = None) -> Case:
    """Rises, or stays near guessing: a loss that stays low may be that of a trained model."""
    run = healthy(rng)
    slope = rng.choice([0.0, rng.uniform(0.05, 0.5)]) if size is None else size
    start = rng.uniform(0.7, 9) if slope else rng.uniform(5.2, 11)
    _set_level(run, start * (1 + slope * run.time))
    return Case("", run.log(), ("not_decreasing",), ("overfitting",))


def _somewhere(run: Run, low: float, high: float) -> int:
    return int(run.n * run.rng.uniform(low, high))


def spike_recovered(rng: np.random.Generator, size: float | None = None) -> Case:
    run = healthy(rng)
    at, decay = _somewhere(run, 0.15, 0.9), rng.uniform(0.4, 3)
    height = rng.uniform(0.3, 2.5) if size is None else size
    shape = np.where(np.arange(run.n) >= at, np.exp(-np.maximum(np.arange(run.n) - at, 0) / decay), 0)
    run.loss = run.loss * (1 + height * shape)
    if rng.random() < 0.7:
        run.norm[at] *= rng.uniform(3, 60)
    return Case("", run.log(), ("spike_recovered",), ("gradient_explosion",), run.step(at))


def spike_sustained(rng: np.random.Generator, size: float | None = None) -> Case:
    run = healthy(rng)
    at = _somewhere(run, 0.25, 0.85)
    after = np.arange(run.n) >= at
    back = 1 - rng.choice([0, 0.3]) * np.clip((run.time - run.time[at]) / max(1e-9, 1 - run.time[at]), 0, 1)
    height = (rng.uniform(0.2, 3) if size is None else size) * run.level[at]
    _set_level(run, np.where(after, run.level[at] + height * back, run.level))
    if rng.random() < 0.6:
        run.norm[after] *= rng.uniform(1, 40)
    return Case(
        "", run.log(), ("spike_sustained",), ("gradient_explosion", "overfitting", "not_decreasing"), run.step(at)
    )


def overfitting(rng: np.random.Generator, size: float | None = None) -> Case:
    run = healthy(rng, epochs=float(rng.integers(3, 8)))
    run.at = np.unique(np.linspace(0, run.n - 1, int(rng.integers(8, 30)) + 1).astype(int)[1:])
    low = rng.uniform(0.25, 0.6)
    t = run.time[run.at]
    rise = rng.uniform(0.06, 0.6) if size is None else size
    valley = 1.3 * np.where(t < low, 1 - 0.3 * t / low, 0.7 + rise * (t - low) / (1 - low))
    run.evaluation = run.level[0] * valley * (1 + rng.normal(0, rng.uniform(0.002, 0.008), len(t)))
    _set_level(run, run.level[0] * (1 - rng.uniform(0.5, 0.8) * run.time**0.7), evaluation=False)
    return Case("", run.log(), ("overfitting",), ("plateau",))


def non_finite(rng: np.random.Generator) -> Case:
    run = healthy(rng)
    at = _somewhere(run, 0.1, 0.95)
    kind = rng.integers(4)
    if kind == 0:
        run.loss[at:] = np.nan
        run.norm[at:] = np.nan
    elif kind == 1:
        run.loss[at] = np.inf
    elif kind == 2:
        run.loss[at:] = 0.0
        run.norm[at:] = np.nan
    else:
        run.norm[at:] = np.nan
    return Case("", run.log(), ("non_finite",), (), run.step(at))


def gradient_explosion(rng: np.random.Generator, size: float | None = None) -> Case:
    """To the end, or for a few steps, which clipping takes care of where they are not out of all proportion."""
    run = healthy(rng)
    at = _somewhere(run, 0.2, 0.85)
    lasts = rng.random() < 0.5
    factor = np.exp(rng.uniform(np.log(20 if lasts else 400), np.log(3000))) if size is None else size
    length = run.n if lasts else int(rng.integers(1, 6))
    run.norm[at : at + length] *= factor
    return Case("", run.log(), ("gradient_explosion",), ("spike_recovered", "spike_sustained"), run.step(at))


def schedule_fault(rng: np.random.Generator) -> Case:
    run = healthy(rng, points=(100, 2500))
    if rng.random() < 0.5:
        at = _somewhere(run, 0.3, 0.8)
        run.rate = np.maximum(run.rate, run.rate.max() * 0.01)
        run.rate[at:] = 0
        _set_level(run, np.where(np.arange(run.n) > at, run.level[at], run.level))
        return Case("", run.log(), ("schedule_fault",), ("plateau",), run.step(at))
    at = _somewhere(run, 0.3, 0.8)
    run.rate = np.maximum(run.rate, run.rate.max() * 0.02)
    run.rate[at:] = np.maximum(run.rate[at:], run.rate[at - 1]) * rng.uniform(4, 30)
    lasting = rng.choice([0.1, 2.0])
    leap = rng.uniform(0.15, 1.0) * np.exp(-(run.time - run.time[at]) / lasting)
    _set_level(run, run.level * np.where(np.arange(run.n) >= at, 1 + leap, 1))
    others = ("spike_sustained", "spike_recovered", "gradient_explosion", "not_decreasing", "overfitting")
    return Case("", run.log(), ("schedule_fault",), others, run.step(at))


def sawtooth(rng: np.random.Generator, size: float | None = None) -> Case:
    # No stairs: a profile as high as they are makes a curve that only falls.
    run = healthy(rng, epochs=float(rng.integers(3, 7)), points=(150, 2500), stairs=False)
    phase = (run.time * run.epochs) % 1
    shapes = [phase - 0.5, 0.5 - phase, np.where(phase < 0.5, 0.5, -0.5), np.abs(phase - 0.5) * 2 - 0.5]
    profile = shapes[rng.integers(4)] * (rng.uniform(0.12, 0.4) if size is None else size)
    run.loss = run.loss * (1 + profile)
    return Case("", run.log(), ("sawtooth",), ("spike_recovered",))


def too_good(rng: np.random.Generator, size: float | None = None) -> Case:
    run = healthy(rng, epochs=float(rng.choice([0.5, 1, 2])))
    start, low = rng.uniform(1, 7), rng.uniform(0.005, 0.08) if size is None else size
    _set_level(run, low + (start - low) * np.exp(-run.time * run.epochs / rng.uniform(0.01, 0.06)))
    return Case("", run.log(), ("too_good",))


def few_supervised_tokens(rng: np.random.Generator, size: float | None = None) -> Case:
    run = healthy(rng)
    _counted(run, 10 ** rng.uniform(-4, -2.1) if size is None else size)
    return Case("", run.log(), ("few_supervised_tokens",))


def _counted(run: Run, share: float) -> None:
    seen = np.cumsum(np.full(run.n, 4096.0 * run.every) * run.rng.uniform(0.8, 1, run.n))
    run.extra["num_tokens_seen"] = np.floor(seen)
    run.extra["num_supervised_tokens"] = np.floor(seen * share * (1 + run.rng.normal(0, 0.02, run.n)))


def _mixed(run: Run, drift: float) -> int:
    asked = run.rng.dirichlet((4, 3, 2))
    at = _somewhere(run, 0.2, 0.6)
    moved = np.clip((run.time - run.time[at]) / (1 - run.time[at]), 0, 1) * drift
    wobble = run.rng.normal(0, 0.01, run.n) / np.sqrt(np.arange(run.n) + 1)
    for name, share, sign in zip("abc", asked, (1, -1, 0), strict=True):
        run.extra[f"mixture/{name}/share"] = share + sign * (moved + wobble)
        run.extra[f"mixture/{name}/asked"] = np.full(run.n, share)
    return run.step(at)


def mixture_drift(rng: np.random.Generator, size: float | None = None) -> Case:
    run = healthy(rng)
    step = _mixed(run, rng.uniform(0.04, 0.2) if size is None else size)
    return Case("", run.log(), ("mixture_drift",), (), step)


def preferences(rng: np.random.Generator, *, falls: bool) -> Run:
    """A DPO run: loss from ln 2, margins that grow, the chosen answers as likely as before or less."""
    run = healthy(rng, points=(40, 600))
    rise = 1 - np.exp(-run.time / rng.uniform(0.2, 0.6))
    deviation = rng.uniform(0.01, 0.05)
    run.loss = 0.693 - rng.uniform(0.15, 0.5) * rise + noise_of(rng, run.n, deviation)
    run.evaluation = None
    run.extra["rewards/margins"] = rng.uniform(0.5, 3) * rise + noise_of(rng, run.n, deviation * 3)
    start = -rng.uniform(60, 300)
    change = -rng.uniform(0.1, 0.6) * rise if falls else rng.uniform(-0.005, 0.1) * rise
    run.extra["logps/chosen"] = start * (1 - change) + noise_of(rng, run.n, abs(start) * 0.03)
    return run


def falling_chosen(rng: np.random.Generator) -> Case:
    return Case("", preferences(rng, falls=True).log(), ("falling_chosen",))


def policy(rng: np.random.Generator) -> Run:
    """A healthy run of PPO: reward and KL rise and level off, entropy falls to a half, lengths move a little."""
    run = healthy(rng, points=(40, 600))
    t, rise = run.time, 1 - np.exp(-run.time / rng.uniform(0.2, 0.7))
    run.loss = noise_of(rng, run.n, 0.05)
    run.evaluation = None
    run.extra["reward"] = rng.uniform(-1, 1) + rng.uniform(0.5, 2) * rise + noise_of(rng, run.n, 0.1)
    run.extra["kl"] = np.abs(rng.uniform(1, 8) * rise * (1 + noise_of(rng, run.n, 0.08)))
    run.extra["entropy"] = rng.uniform(0.8, 2.5) * (1 - rng.uniform(0.1, 0.5) * t) * (1 + noise_of(rng, run.n, 0.04))
    length = rng.uniform(30, 300) * (1 + rng.uniform(-0.2, 0.4) * t)
    run.extra["completions/mean_length"] = length * (1 + noise_of(rng, run.n, 0.05))
    return run


def reward_hacking(rng: np.random.Generator) -> Case:
    run = policy(rng)
    run.extra["kl"] = run.extra["kl"] * np.exp(rng.uniform(4, 7) * run.time**2)
    return Case("", run.log(), ("reward_hacking",), ("length_growth", "entropy_collapse"))


def entropy_collapse(rng: np.random.Generator) -> Case:
    run = policy(rng)
    middle = rng.uniform(0.3, 0.7)
    run.extra["entropy"] = run.extra["entropy"] * (0.03 + 0.97 / (1 + np.exp((run.time - middle) / 0.05)))
    return Case("", run.log(), ("entropy_collapse",))


def length_growth(rng: np.random.Generator) -> Case:
    """Longer for no gain, or because answers no longer end; those that grow with their reward may well be meant to."""
    run = policy(rng)
    if rng.random() < 0.5:
        run.extra["reward"] = rng.uniform(-1, 1) + noise_of(rng, run.n, 0.1)
    else:
        run.extra["completions/clipped_ratio"] = np.clip(
            rng.uniform(0.2, 0.8) * run.time + noise_of(rng, run.n, 0.02), 0, 1
        )
    run.extra["completions/mean_length"] = run.extra["completions/mean_length"] * (1 + rng.uniform(1.6, 5) * run.time)
    return Case("", run.log(), ("length_growth",))


FAULTS: dict[str, Callable[..., Case]] = {
    function.__name__: function
    for function in (
        *(plateau, not_decreasing, spike_recovered, spike_sustained, overfitting, non_finite, gradient_explosion),
        *(schedule_fault, sawtooth, too_good, few_supervised_tokens, mixture_drift),
        *(falling_chosen, reward_hacking, entropy_collapse, length_growth),
    )
}


#: Sizes of faults with what they mean, for the share that is found of each.
SIZES: dict[str, tuple[str, tuple[float, ...]]] = {
    "spike_recovered": ("height at its first step, of the loss", (0.1, 0.2, 0.35, 0.7)),
    "spike_sustained": ("height, of the loss", (0.05, 0.1, 0.2, 0.4)),
    "not_decreasing": ("rise over the run, of the loss", (0.02, 0.05, 0.1, 0.2)),
    "overfitting": ("rise of the evaluation loss, of the first one", (0.02, 0.04, 0.08, 0.16)),
    "gradient_explosion": ("times the norm, half of them for a few steps", (10, 30, 100, 300, 1000)),
    "sawtooth": ("from low to high, of the loss", (0.03, 0.06, 0.12, 0.24)),
    "too_good": ("nats per token", (0.3, 0.15, 0.08, 0.04)),
    "few_supervised_tokens": ("share of the tokens", (0.02, 0.01, 0.005)),
    "mixture_drift": ("of the whole, at the end", (0.01, 0.02, 0.04, 0.08)),
}


def healthy_case(rng: np.random.Generator) -> Case:
    """A healthy run of language modelling, preference optimisation or PPO; or of a trained model with little to learn."""
    kind = rng.integers(7)
    if kind == 6:
        run = healthy(rng)
        _set_level(run, rng.uniform(1, 4) * (1 - rng.choice([0, rng.uniform(0, 0.04)]) * run.time))
        return Case("", run.log())
    run = preferences(rng, falls=False) if kind == 0 else policy(rng) if kind == 1 else healthy(rng)
    if kind > 1 and rng.random() < 0.5:
        _counted(run, rng.uniform(0.05, 1))
        _mixed(run, 0.0)
    return Case("", run.log())


def of_size(kind: str, size: float, n: int, seed: int = 0) -> list[Case]:
    """Cases of one fault in one size."""
    return [FAULTS[kind](np.random.default_rng([seed, *kind.encode(), i]), size) for i in range(n)]


def generate(each: int = 40, sound: int = 200, seed: int = 0) -> list[Case]:
    """All cases: `each` of every fault and `sound` healthy ones; even ones to develop on, odd ones to report."""
    cases = []
    for kind, function in {**FAULTS, "healthy": healthy_case}.items():
        for i in range(sound if kind == "healthy" else each):
            case = function(np.random.default_rng([seed, *kind.encode(), i]))
            case.name = f"{kind}-{i}"
            cases.append(case)
    return cases
