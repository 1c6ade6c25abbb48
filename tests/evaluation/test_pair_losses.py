"""The losses of DPO over a set of pairs, by the formulas of their papers in plain Python."""

from __future__ import annotations

import math
from inspect import signature

import numpy as np
import pytest
from trl import DPOConfig

from hf_objectives.errors import ConfigError
from hf_objectives.evaluation.pair_losses import PAIR_LOSSES, PairLoss
from hf_objectives.evaluation.pair_scores import COLUMNS

RATIOS = {"chosen": [0.5, -2.0, 3.0], "rejected": [1.5, -1.0, -4.0]}
LOGPS = {"chosen": [-10.0, -20.0, -5.0], "rejected": [-12.0, -11.0, -30.0]}
TOKENS = {"chosen": [2, 5, 1], "rejected": [4, 2, 8]}
WEIGHTS = {"chosen": [0.5, 1.0, 2.0], "rejected": [1.0, 0.25, 0.5]}
BETA, SMOOTHING, TAU = 0.3, 0.1, 0.05


def columns():
    made = {name: np.zeros(3) for name in COLUMNS}
    for side in ("chosen", "rejected"):
        figures = {"ratio": RATIOS, "logps": LOGPS, "tokens": TOKENS, "length": TOKENS, "weight": WEIGHTS}
        made |= {f"{side}_{name}": np.array(values[side], float) for name, values in figures.items()}
        made[f"{side}_nats"] = -made[f"{side}_logps"]
    return made


def loss(*names, **settings):
    return PairLoss(names or ("sigmoid",), beta=BETA, label_smoothing=SMOOTHING, **settings).of(columns())


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def logistic(x):
    return -math.log(sigmoid(x))


def smoothed(x):
    return (1 - SMOOTHING) * logistic(BETA * x) + SMOOTHING * logistic(-BETA * x)


def exo(w, r):
    p, q = sigmoid(BETA * (w - r)), sigmoid(BETA * (r - w))
    return p * math.log(p / (1 - SMOOTHING)) + q * math.log(q / SMOOTHING)


def discopop(w, r):
    x = BETA * (w - r)
    share = sigmoid(x / TAU)
    return logistic(x) * (1 - share) + math.exp(-x) * share


# The loss of one pair, of the log ratios of its answers.
OF_RATIOS = {
    "sigmoid": lambda w, r: logistic(BETA * (w - r)),
    "hinge": lambda w, r: max(0.0, 1 - BETA * (w - r)),
    "exo_pair": exo,
    "nca_pair": lambda w, r: logistic(BETA * w) + 0.5 * logistic(-BETA * w) + 0.5 * logistic(-BETA * r),
    "robust": lambda w, r: (
        ((1 - SMOOTHING) * logistic(BETA * (w - r)) - SMOOTHING * logistic(BETA * (r - w))) / (1 - 2 * SMOOTHING)
    ),
    "bco_pair": lambda w, r: logistic(BETA * w) + logistic(-BETA * r),
    "sppo_hard": lambda w, r: (w - 0.5 / BETA) ** 2 + (r + 0.5 / BETA) ** 2,
    "apo_zero": lambda w, r: 1 - sigmoid(BETA * w) + sigmoid(BETA * r),
    "apo_down": lambda w, r: sigmoid(BETA * w) + 1 - sigmoid(BETA * (w - r)),
    "discopop": discopop,
}
PAIRS = [*zip(*RATIOS.values(), strict=True)]
PER_TOKEN = [w / n - r / m for w, r, n, m in zip(*RATIOS.values(), *TOKENS.values(), strict=True)]
OVER_THE_SET = {
    **{name: sum(of(*pair) for pair in PAIRS) / 3 for name, of in OF_RATIOS.items()},
    "ipo": sum((x - 1 / (2 * BETA)) ** 2 for x in PER_TOKEN) / 3,
    "sigmoid_norm": sum(logistic(BETA * x) for x in PER_TOKEN) / 3,
    "sft": 35 / 8,  # nats of all chosen answers over their tokens
    # log ratios of chosen to rejected: 2, -9, 25 under the policy; less -1, -1, 7 they are 3, -8, 18 under the reference
    "aot": (smoothed(-9 + 8) + smoothed(2 - 3) + smoothed(25 - 18)) / 3,
    # sorted: -2, 0.5, 3 and -4, -1, 1.5
    "aot_unpaired": (smoothed(2) + smoothed(1.5) + smoothed(1.5)) / 3,
}


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_loss_over_the_set(name):
    assert loss(name) == pytest.approx(OVER_THE_SET[name], rel=1e-12)


def test_several_losses_and_weights_of_pairs():
    expected = 0.8 * OVER_THE_SET["hinge"] + 2.0 * OVER_THE_SET["sft"]
    assert loss("hinge", "sft", loss_weights=(0.8, 2.0)) == pytest.approx(expected, rel=1e-12)
    weighted = sum(share * OF_RATIOS["sigmoid"](*pair) for share, pair in zip((0.5, 0.25, 1.0), PAIRS, strict=True)) / 3
    assert loss(use_weighting=True) == pytest.approx(weighted, rel=1e-12)


@pytest.mark.parametrize(
    ("kind", "score"),
    [
        ("forward_kl", lambda t: 1 - math.exp(-t)),
        ("js_divergence", lambda t: math.log(2) - logistic(t)),
        ("alpha_divergence", lambda t: (math.exp(-0.5 * t) - 1) / -0.5),
    ],
)
def test_divergences(kind, score):
    expected = sum(logistic(BETA * (score(w) - score(r))) for w, r in PAIRS) / 3
    assert loss(f_divergence_type=kind) == pytest.approx(expected, rel=1e-12)
    limit = loss(f_divergence_type="alpha_divergence", f_alpha_divergence_coef=1.0)
    assert limit == pytest.approx(OVER_THE_SET["sigmoid"], rel=1e-12)


def test_the_two_cures():
    assert loss(nll_weight=0.5) == pytest.approx(OVER_THE_SET["sigmoid"] + 0.5 * 35 / 8, rel=1e-12)
    lowered = sum(logistic(BETA * (w - r - 2 * max(0.0, -w))) for w, r in PAIRS) / 3
    assert loss(dpop_lambda=2.0) == pytest.approx(lowered, rel=1e-12)
    assert loss(dpop_lambda=2.0, loss_weights=(3.0,)) == pytest.approx(3 * lowered, rel=1e-12)


def test_defaults_are_trls():
    theirs = {name: field.default for name, field in DPOConfig.__dataclass_fields__.items()}
    own = {name: parameter.default for name, parameter in signature(PairLoss).parameters.items()}
    shared = {name: value for name, value in own.items() if name in theirs and name != "loss_weights"}
    assert len(shared) == 6 and shared == {name: theirs[name] for name in shared}


def test_a_loss_that_is_not_known_is_refused():
    with pytest.raises(ConfigError, match="loss_type is 'sigmod'; expected one of .*did you mean 'sigmoid'"):
        PairLoss(("sigmod",))
