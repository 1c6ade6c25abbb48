"""What preference and reinforcement learning show: likelihoods, KL, entropy and lengths that run away."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from hf_objectives.diagnostics.curves import Series
from hf_objectives.diagnostics.robust import edges, noise, trend
from hf_objectives.diagnostics.run_view import RunView, Sign

_ENOUGH = 10  # points of a curve
_COLLAPSED = 0.2  # of the entropy at the beginning
_GROWN = 2.0  # times the length at the beginning
_EXPLODES = 3.0  # times the KL in the middle of the run
_MORE_CUT = 0.1  # of the answers
#: Keys of one thing in the logs of several trainers, the best first.
CHOSEN = ("logps_change/chosen", "logps/chosen")
KL = ("kl", "objective/kl", "kl_per_answer")
REWARD = ("reward", "objective/scores", "rewards/mean")
ENTROPY = ("entropy", "policy/entropy_avg")  # of a token; TRL's objective/entropy is the sum over an answer
LENGTH = ("completions/mean_length", "completion_length")
_CUT = ("completions/clipped_ratio",)  # share of answers that never ended


def _first_of(run: RunView, keys: Sequence[str]) -> tuple[str, Series]:
    """The first of the curves that has enough points, with its name; "" and no points where none has."""
    return next(((key, run[key]) for key in keys if len(run[key].steps) >= _ENOUGH), ("", run[""]))


def falling_chosen(run: RunView) -> Iterator[Sign]:
    """Preference training makes the chosen answers less likely, and the rejected ones still less."""
    key, (steps, values) = _first_of(run, CHOSEN)
    if not key or "rewards/margins" not in run:
        return
    start, end = edges(values)
    error = 1.25 * noise(values) * (2 / max(3, len(values) // 10)) ** 0.5
    per_token = key == CHOSEN[0]
    size = 0.02 if per_token else max(0.02 * abs(start), 1.0)
    if start - end > max(4 * error, size) and trend(values).p_falls < 0.01:
        margin = run["rewards/margins"].values
        unit = "nats per token" if per_token else "nats per answer"
        evidence = f"log-probability of the chosen answers {start:.4g} to {end:.4g} {unit}"
        evidence += f"; margin {margin[0]:.3g} to {margin[-1]:.3g}" if len(margin) > 1 else ""
        yield Sign("warning", int(steps[0]), int(steps[-1]), evidence)


def reward_hacking(run: RunView) -> Iterator[Sign]:
    """The reward rises while the policy runs away from its reference."""
    key, (steps, kl) = _first_of(run, KL)
    name, (_, reward) = _first_of(run, REWARD)
    if not key or not name:
        return
    n = len(kl)
    (begin, _), (_, end), (low, high) = edges(kl, 5), edges(kl), edges(reward)
    middle = float(np.median(kl[int(0.4 * n) : max(int(0.6 * n), int(0.4 * n) + 3)]))
    rises = high - low > 2 * noise(reward) / max(3, len(reward) // 10) ** 0.5
    explodes = end > max(_EXPLODES * max(middle, 1e-6), 5 * max(begin, 1e-6), middle + 6 * noise(kl))
    if rises and explodes:
        first = int(np.argmax(kl > (middle + end) / 2))
        evidence = (
            f"{name} {low:.3g} to {high:.3g} while {key} goes from {middle:.3g} in the middle of the run to {end:.3g}"
        )
        yield Sign("warning", int(steps[first]), int(steps[-1]), evidence)


def entropy_collapse(run: RunView) -> Iterator[Sign]:
    """The policy's entropy falls below a fifth of what it began with."""
    key, (steps, values) = _first_of(run, ENTROPY)
    if not key or not _first_of(run, REWARD)[0]:
        return
    start, end = edges(values)
    if start > 0 and end < _COLLAPSED * start and start - end > 4 * noise(values):
        first = int(np.argmax(values < _COLLAPSED * start))
        yield Sign("warning", int(steps[first]), int(steps[-1]), f"entropy {start:.3g} to {end:.3g} nats")


def length_growth(run: RunView) -> Iterator[Sign]:
    """Answers become twice as long. A warning where more of them are cut off, or the reward stands."""
    key, (steps, values) = _first_of(run, LENGTH)
    if not key:
        return
    start, end = edges(values)
    if start <= 0 or end <= _GROWN * start or end - start <= 4 * noise(values):
        return
    name, (_, reward) = _first_of(run, REWARD)
    evidence = f"mean length of an answer {start:.0f} to {end:.0f} tokens"
    gains, more_cut = False, False
    if name:
        low, high = edges(reward)
        gains = trend(reward).p_falls > 0.5 and high - low > 2 * noise(reward)
        evidence += f"; {name} {low:.3g} to {high:.3g}"
    cut = _first_of(run, _CUT)[1].values
    if len(cut):
        before, after = edges(cut)
        more_cut = after - before >= _MORE_CUT
        evidence += f"; answers cut off {before:.0%} to {after:.0%}"
    first = int(np.argmax(values > _GROWN * start))
    yield Sign("info" if gains and not more_cut else "warning", int(steps[first]), int(steps[-1]), evidence)
