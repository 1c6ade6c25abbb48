"""The losses of DPO over a whole set of pairs, in float64: what TRL's loss would be if one batch held every pair."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hf_objectives.types import check_one_of

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class PairLoss:
    """The settings of a loss over pairs; names and meaning are those of `trl.DPOConfig` and `PerplexityDPOConfig`.

    Raises:
        ConfigError: a loss type that is not among `PAIR_LOSSES`.
    """

    loss_types: tuple[str, ...] = ("sigmoid",)
    loss_weights: tuple[float, ...] = (1.0,)
    beta: float = 0.1
    label_smoothing: float = 0.0
    discopop_tau: float = 0.05
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    use_weighting: bool = False
    nll_weight: float = 0.0
    dpop_lambda: float = 0.0

    def __post_init__(self) -> None:
        for name in self.loss_types:
            check_one_of("loss_type", name, PAIR_LOSSES)

    def of(self, columns: Mapping[str, Array]) -> float:
        """Compute the loss of the pairs.

        Args:
            columns: float64 [pairs] by the names of `pair_scores.COLUMNS`, each pair once.
        """
        with np.errstate(over="ignore", invalid="ignore"):  # an infinite loss is one in training too
            return self._of(columns)

    def _of(self, columns: Mapping[str, Array]) -> float:
        ratios = Sides(columns["chosen_ratio"], columns["rejected_ratio"])
        logps = Sides(columns["chosen_logps"], columns["rejected_logps"])
        scores = Sides(*map(self._divergence, ratios))
        means = Sides(*(score / columns[f"{side}_length"].clip(1) for side, score in zip(_SIDES, scores, strict=True)))
        nats_per_token = np.full(1, columns["chosen_nats"].sum() / columns["chosen_tokens"].sum())
        pairs = _Pairs(ratios, scores.margin, means.margin, logps, nats_per_token, self)
        weights = columns["chosen_weight"] * columns["rejected_weight"] if self.use_weighting else 1.0
        total = self.nll_weight * float(nats_per_token[0])
        for name, share in zip(self.loss_types, self.loss_weights, strict=True):
            total += share * float((PAIR_LOSSES[name](pairs) * weights).mean())
        if self.dpop_lambda:
            lowered = ratios.margin - self.dpop_lambda * (-ratios.chosen).clip(0)
            added = _log_sigmoid(self.beta * ratios.margin) - _log_sigmoid(self.beta * lowered)
            total += self.loss_weights[0] * float(added.mean())
        return total

    def _divergence(self, ratios: Array) -> Array:
        """f'(π / π_ref) of log ratios; TRL's choices by name, with its bound for exp."""
        if self.f_divergence_type == "forward_kl":
            return 1 - np.exp(-ratios)
        if self.f_divergence_type == "js_divergence":
            return math.log(2) + _log_sigmoid(ratios)
        order = self.f_alpha_divergence_coef - 1
        if self.f_divergence_type == "alpha_divergence" and abs(order) >= 1e-6:
            return (np.exp((order * ratios).clip(max=80)) - 1) / order
        return ratios


_SIDES = ("chosen", "rejected")


class Sides(NamedTuple):
    """A figure of the chosen and of the rejected answers, float64 [pairs] each."""

    chosen: Array
    rejected: Array

    @property
    def margin(self) -> Array:
        """Chosen minus rejected."""
        return self.chosen - self.rejected


class _Pairs(NamedTuple):
    """What losses are made of.

    Attributes:
        ratios: log π(y|x) − log π_ref(y|x).
        delta: the difference of scores, which are the ratios under reverse KL.
        mean_delta: the same of scores per token.
        logps: log π(y|x).
        nats: nats per chosen token over all pairs, [1].
        settings: of the loss.
    """

    ratios: Sides
    delta: Array
    mean_delta: Array
    logps: Sides
    nats: Array
    settings: PairLoss

    def smoothed(self, margins: Array) -> Array:
        """The logistic loss with smoothed labels."""
        margins, smoothing = self.settings.beta * margins, self.settings.label_smoothing
        return -(1 - smoothing) * _log_sigmoid(margins) - smoothing * _log_sigmoid(-margins)


def _log_sigmoid(values: Array) -> Array:
    return -np.logaddexp(0.0, -values)


def _sigmoid(values: Array) -> Array:
    return np.exp(_log_sigmoid(values))


def _exo_pair(p: _Pairs) -> Array:
    margins, epsilon = p.settings.beta * p.delta, p.settings.label_smoothing
    won, lost = _log_sigmoid(margins), _log_sigmoid(-margins)
    return np.exp(won) * (won - math.log1p(-epsilon)) + np.exp(lost) * (lost - math.log(epsilon))


def _robust(p: _Pairs) -> Array:
    margins, flipped = p.settings.beta * p.delta, p.settings.label_smoothing
    return (flipped * _log_sigmoid(-margins) - (1 - flipped) * _log_sigmoid(margins)) / (1 - 2 * flipped)


def _nca_pair(p: _Pairs) -> Array:
    chosen, rejected = (p.settings.beta * ratios for ratios in p.ratios)
    return -_log_sigmoid(chosen) - 0.5 * _log_sigmoid(-chosen) - 0.5 * _log_sigmoid(-rejected)


def _sppo_hard(p: _Pairs) -> Array:
    half = 0.5 / p.settings.beta
    return (p.ratios.chosen - half) ** 2 + (p.ratios.rejected + half) ** 2


def _aot(p: _Pairs) -> Array:
    reference = p.logps.margin - p.ratios.margin
    return p.smoothed(np.sort(p.logps.margin) - np.sort(reference))


def _discopop(p: _Pairs) -> Array:
    margins = p.settings.beta * p.delta
    share = _sigmoid(margins / p.settings.discopop_tau)
    return -_log_sigmoid(margins) * (1 - share) + np.exp(-margins) * share


def _apo_zero(p: _Pairs) -> Array:
    return 1 - _sigmoid(p.settings.beta * p.ratios.chosen) + _sigmoid(p.settings.beta * p.ratios.rejected)


def _apo_down(p: _Pairs) -> Array:
    return _sigmoid(p.settings.beta * p.ratios.chosen) + 1 - _sigmoid(p.settings.beta * p.ratios.margin)


#: The loss of each pair by TRL's name, whose code has the papers; [1] for a mean over tokens. `aot` and `aot_unpaired` sort
#: all pairs.
PAIR_LOSSES: dict[str, Callable[[Any], Array]] = {
    "sigmoid": lambda p: -_log_sigmoid(p.settings.beta * p.delta),
    "hinge": lambda p: (1 - p.settings.beta * p.delta).clip(0),
    "ipo": lambda p: (p.mean_delta - 0.5 / p.settings.beta) ** 2,
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "robust": _robust,
    "bco_pair": lambda p: (
        -_log_sigmoid(p.settings.beta * p.ratios.chosen) - _log_sigmoid(-p.settings.beta * p.ratios.rejected)
    ),
    "sppo_hard": _sppo_hard,
    "aot": _aot,
    "aot_unpaired": lambda p: p.smoothed(np.sort(p.ratios.chosen) - np.sort(p.ratios.rejected)),
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
    "discopop": _discopop,
    "sft": lambda p: p.nats,
    "sigmoid_norm": lambda p: -_log_sigmoid(p.settings.beta * p.mean_delta),
}
