"""The weights of a mixture: published ones, temperature, and weights that change as a run goes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hf_objectives.errors import ConfigError
from hf_objectives.mixture.schedule import normalised

#: GPT-3's mixture (Brown et al., arXiv 2005.14165, table 2.2) as commonly rounded; it adds to 1.04.
DATA_MIXTURE = {"common_crawl": 0.60, "books": 0.16, "wikipedia": 0.03, "github": 0.03, "webtext": 0.22}
#: An approximation of Llama 3's.
LLAMA3_MIXTURE = {"web": 0.82, "code": 0.08, "math": 0.04, "books": 0.03, "other": 0.03}
PRESETS = {"gpt3": DATA_MIXTURE, "llama3": LLAMA3_MIXTURE}

_RAMP_PIECES = 1024


def tempered(weights: ArrayLike, temperature: float) -> NDArray[np.float64]:
    """Weights p_i^(1/T), normalised, float64 [sources]: above 1 they move towards equal ones (mT5, arXiv 2010.11934,
    section 3.2, with alpha = 1/T).

    Raises:
        ConfigError: a temperature that is not above 0, or weights that mean nothing.
    """
    if not temperature > 0:
        raise ConfigError(f"temperature is {temperature}; expected more than 0")
    shares = normalised(weights)
    with np.errstate(divide="ignore"):  # a weight of 0 stays 0
        return normalised(np.exp((np.log(shares) - np.log(shares.max())) / temperature))


@dataclass(frozen=True)
class Stage:
    """Weights from some point of the run on.

    Attributes:
        begin: units of the mixture (tokens, by default) after which the weights change.
        weights: float64 [sources], normalised.
        end: where the change is complete; the weights move there in a straight line. `begin` for a step.
    """

    begin: int
    weights: NDArray[np.float64]
    end: int


class WeightPlan:
    """The weights at every point of a run.

    Args:
        weights: at the begin, [sources].
        stages: later ones, in order, each beginning where the one before is complete, or later.

    Raises:
        ConfigError: weights that mean nothing, or stages out of order.
    """

    def __init__(self, weights: ArrayLike, stages: Sequence[Stage] = ()) -> None:
        self.weights, self.stages = normalised(weights), tuple(stages)
        complete = 0
        for number, stage in enumerate(self.stages):
            if stage.begin < complete or stage.end < stage.begin:
                raise ConfigError(
                    f"stage {number} goes from {stage.begin} to {stage.end}, and what comes before is complete at "
                    f"{complete}; expected stages one after the other"
                )
            complete = stage.end

    def pieces(self) -> list[tuple[int, NDArray[np.float64]]]:
        """Where the weights change, and to which, float64 [sources]; what `Schedule` takes as `later`.

        A straight line is walked in 1,024 steps, each with the weights of its middle, so that what is due at its end is
        what the line would give.
        """
        pieces, before = [], self.weights
        for stage in self.stages:
            length = stage.end - stage.begin
            steps = min(_RAMP_PIECES, length)
            for step in range(steps):
                share = (step + 0.5) / steps
                pieces.append((stage.begin + step * length // steps, before + share * (stage.weights - before)))
            before = stage.weights
            pieces.append((stage.end, before))
        return pieces

    def due(self, units: float) -> NDArray[np.float64]:
        """What each source should have had after so many units, float64 [sources]."""
        due, at, weights = np.zeros(len(self.weights)), 0.0, self.weights
        for stage in self.stages:
            due += weights * (min(stage.begin, units) - at)
            if units <= stage.begin:
                return due
            length, end = stage.end - stage.begin, min(stage.end, units)
            if length:  # the middle of the part of the line that is walked
                share = (end - stage.begin) / length / 2
                due += (weights + share * (stage.weights - weights)) * (end - stage.begin)
            if units <= stage.end:
                return due
            at, weights = stage.end, stage.weights
        return due + weights * (units - at)
