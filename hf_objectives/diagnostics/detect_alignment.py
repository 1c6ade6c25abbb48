"""Signatures of preference and reinforcement learning: likelihoods, KL, entropy and lengths that run away."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from hf_objectives.diagnostics.curves import Curves
from hf_objectives.diagnostics.detect_loss import finite
from hf_objectives.diagnostics.log_table import Series
from hf_objectives.diagnostics.robust import noise, trend
from hf_objectives.inspection import Finding

_ENOUGH = 10
_COLLAPSED = 0.2  # of the entropy at the beginning
_GROWN = 2.0  # times the length at the beginning
_EXPLODES = 3.0  # times the KL in the middle of the run
_CHOSEN = ("logps_change/chosen", "logps/chosen")
_KL = ("kl", "objective/kl", "kl_per_answer")
_REWARD = ("reward", "objective/scores", "rewards/mean")
_ENTROPY = ("entropy", "policy/entropy_avg")  # per token; TRL's objective/entropy is the sum over an answer
_LENGTH = ("completions/mean_length", "completion_length")
_CUT = ("completions/clipped_ratio",)  # share of answers that never ended
_MORE_CUT = 0.1


def _first_of(run: Curves, keys: Sequence[str]) -> tuple[str, Series]:
    for key in keys:
        series = finite(run.get(key))
        if len(series.steps) >= _ENOUGH:
            return key, series
    return "", Series(np.zeros(0, np.int64), np.zeros(0))


def _ends(values: np.ndarray) -> tuple[float, float]:
    """Medians of the first and the last tenth, of three values at least."""
    few = max(3, len(values) // 10)
    return float(np.median(values[:few])), float(np.median(values[-few:]))


def falling_chosen(run: Curves) -> Iterator[Finding]:
    """falling_chosen: preference training makes the chosen answers less likely, and the rejected ones still less."""
    key, series = _first_of(run, _CHOSEN)
    if not key or "rewards/margins" not in run:
        return
    steps, values = series
    start, end = _ends(values)
    whole = trend(values)
    error = 1.25 * noise(values) * (2 / max(3, len(values) // 10)) ** 0.5
    size = 0.02 if key == _CHOSEN[0] else max(0.02 * abs(start), 1.0)
    if start - end > max(4 * error, size) and whole.p_falls < 0.01:
        margin = finite(run.get("rewards/margins")).values
        grown = f"; margin {margin[0]:.3g} to {margin[-1]:.3g}" if len(margin) > 1 else ""
        unit = "nats per token" if key == _CHOSEN[0] else "nats per answer"
        yield Finding(
            "falling_chosen",
            int(steps[0]),
            "warning",
            f"log-probability of the chosen answers {start:.4g} to {end:.4g} {unit}{grown}",
            "The margin grows by pushing both answers down. Add the chosen answers' likelihood (nll_weight, rpo_alpha, or "
            "dpop_lambda), raise beta, lower the learning rate, or fine-tune on the chosen answers first.",
            int(steps[-1]),
        )


def reward_hacking(run: Curves) -> Iterator[Finding]:
    """reward_hacking: the reward rises while the policy runs away from its reference."""
    key, kl = _first_of(run, _KL)
    name, reward = _first_of(run, _REWARD)
    if not key or not name:
        return
    n = len(kl.values)
    begin = float(np.median(kl.values[: max(3, n // 5)]))
    middle = float(np.median(kl.values[int(0.4 * n) : max(int(0.6 * n), int(0.4 * n) + 3)]))
    _, end = _ends(kl.values)
    low, high = _ends(reward.values)
    rises = high - low > 2 * noise(reward.values) / max(3, len(reward.values) // 10) ** 0.5
    if (
        rises
        and end > _EXPLODES * max(middle, 1e-6)
        and end > 5 * max(begin, 1e-6)
        and end - middle > 6 * noise(kl.values)
    ):
        first = int(np.argmax(kl.values > (middle + end) / 2))
        yield Finding(
            "reward_hacking",
            int(kl.steps[first]),
            "warning",
            f"{name} {low:.3g} to {high:.3g} while {key} goes from {middle:.3g} in the middle of the run to {end:.3g}",
            "The policy leaves what the reward model was trained on: read its answers. Raise beta or set kl_target, stop "
            "earlier, lower the learning rate, or mend the reward.",
            int(kl.steps[-1]),
        )


def entropy_collapse(run: Curves) -> Iterator[Finding]:
    """entropy_collapse: the policy's entropy falls below a fifth of what it began with."""
    key, series = _first_of(run, _ENTROPY)
    if not key or not _first_of(run, _REWARD)[0]:
        return
    steps, values = series
    start, end = _ends(values)
    if start > 0 and end < _COLLAPSED * start and start - end > 4 * noise(values):
        first = int(np.argmax(values < _COLLAPSED * start))
        yield Finding(
            "entropy_collapse",
            int(steps[first]),
            "warning",
            f"entropy {start:.3g} to {end:.3g} nats",
            "The policy samples one answer, so there is nothing left to compare. An entropy bonus (entropy_coef), a higher "
            "temperature, a larger beta, a lower learning rate, or an earlier checkpoint.",
            int(steps[-1]),
        )


def length_growth(run: Curves) -> Iterator[Finding]:
    """length_growth: answers become twice as long as they were; a warning where more are cut off, or the reward stands."""
    key, series = _first_of(run, _LENGTH)
    if not key:
        return
    steps, values = series
    start, end = _ends(values)
    if start <= 0 or end <= _GROWN * start or end - start <= 4 * noise(values):
        return
    name, reward = _first_of(run, _REWARD)
    _, cut = _first_of(run, _CUT)
    first = int(np.argmax(values > _GROWN * start))
    before, after = _ends(cut.values) if len(cut.values) else (0.0, 0.0)
    low, high = _ends(reward.values) if name else (0.0, 0.0)
    gains = bool(name) and trend(reward.values).p_falls > 0.5 and high - low > 2 * noise(reward.values)
    said = f"; {name} {low:.3g} to {high:.3g}" if name else ""
    said += f"; answers cut off {before:.0%} to {after:.0%}" if len(cut.values) else ""
    yield Finding(
        "length_growth",
        int(steps[first]),
        "info" if gains and after - before < _MORE_CUT else "warning",
        f"mean length of an answer {start:.0f} to {end:.0f} tokens{said}",
        "The reward prefers long answers, or answers no longer end. Read them, and look at the share of finished ones; "
        "penalise length or a missing stop token, and balance the lengths of the reward's training pairs.",
        int(steps[-1]),
    )
