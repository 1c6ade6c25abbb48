"""The weights of a mixture: as they are given, published, tempered or drawn, and as they change during a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hf_objectives.errors import ConfigError
from hf_objectives.mixture.config import PRESETS, MixtureConfig, StageConfig, number
from hf_objectives.mixture.schedule import Schedule, normalised
from hf_objectives.types import check_keys, check_one_of

_RAMP_PIECES = 1024
_NAMED = 12  # sources that a line names


def tempered(weights: ArrayLike, temperature: float) -> NDArray[np.float64]:
    """Weights p_i^(1/T), normalised, float64 [sources]; a T above 1 moves them towards equal ones (mT5, arXiv 2010.11934,
    section 3.2, with alpha = 1/T)."""
    if not temperature > 0:
        raise ConfigError(f"temperature is {temperature}; expected more than 0")
    shares = normalised(weights)
    with np.errstate(divide="ignore"):  # a weight of 0 stays 0
        return normalised(np.exp((np.log(shares) - np.log(shares.max())) / temperature))


def draw_mixtures(prior: ArrayLike, n: int, *, concentration: float = 1.0, seed: int = 0) -> NDArray[np.float64]:
    """Draw mixtures to try: the prior itself, then draws of a Dirichlet distribution around it (as RegMix, arXiv
    2407.01492).

    A longer list for the same seed begins with the shorter one, so a search can be continued.

    Args:
        prior: weights of the sources, [sources], 0 or more; normalised. A source of weight 0 gets none in any draw.
        n: number of mixtures.
        concentration: how close draws are to the prior. The parameters of the distribution are
            `concentration * sources * prior`, so its mean is the prior. At 1, and for a prior of equal weights, all
            mixtures are equally likely.
        seed: seed of the draws.

    Returns:
        Float64 [n, sources], rows that sum to one.

    Raises:
        ConfigError: the prior cannot be normalised, `n` is under 1, or the concentration is not above 0.
    """
    shares = normalised(prior)
    if n < 1 or not 0 < concentration < float("inf"):
        raise ConfigError(f"n is {n} and concentration {concentration}; expected at least 1, and a number above 0")
    used = np.flatnonzero(shares)
    drawn = np.zeros((n, len(shares)))
    drawn[0] = shares
    rng = np.random.default_rng(seed)
    for row in drawn[1:]:  # one by one: the beginning of a longer list is the shorter one
        row[used] = _dirichlet(rng, concentration * len(used) * shares[used])
    return drawn


def _dirichlet(rng: np.random.Generator, alpha: NDArray[np.float64]) -> NDArray[np.float64]:
    """One draw, from logarithms, since with small parameters all gamma draws may be 0."""
    # Marsaglia and Tsang 2000, section 6: gamma(a) is gamma(a + 1) times u^(1/a).
    with np.errstate(over="ignore"):  # of a weight next to none, which becomes 0
        logs = np.log(rng.standard_gamma(alpha + 1)) + np.log(1 - rng.random(len(alpha))) / alpha
    weights = np.exp(logs - logs.max())
    return weights / weights.sum()


class Stage(NamedTuple):
    """`StageConfig` with its weights in the order of the sources, float64 [sources], normalised; a step ends at `begin`."""

    begin: int
    weights: NDArray[np.float64]
    end: int


class WeightPlan:
    """The weights at every point of a run: at its beginning, [sources], and in stages that must not overlap."""

    def __init__(self, weights: ArrayLike, stages: Sequence[Stage] = ()) -> None:
        self.weights, self.stages = normalised(weights), tuple(stages)
        complete = 0
        for i, stage in enumerate(self.stages):
            if stage.begin < complete or stage.end < stage.begin:
                raise ConfigError(
                    f"stage {i} goes from {stage.begin} to {stage.end}, and what comes before is complete at "
                    f"{complete}; expected stages one after the other"
                )
            complete = stage.end

    def pieces(self) -> list[tuple[int, NDArray[np.float64]]]:
        """The units at which the weights change, and the new weights, float64 [sources].

        A straight line becomes at most 1,024 steps, each with the weights of its middle. So at the end of the line every
        source is due exactly what the line gives.
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

    def schedule(self) -> Schedule:
        """A new schedule under these weights."""
        return Schedule(self.weights, self.pieces())


def plan_weights(config: MixtureConfig, sizes: Sequence[int | None]) -> tuple[WeightPlan, list[str]]:
    """The weights of a mixture over the run, and notes about them for the user.

    Without given weights sources get the `sizes` of their epochs, in the mixture's unit.
    """
    notes: list[str] = []
    weights = _preset_weights(config, notes) if config.preset else _given_weights(config, sizes, notes)
    shares, total = normalised(weights, config.names), sum(weights)
    if abs(total - 1) > 1e-9 and any(source.weight is not None for source in config.sources) | bool(config.preset):
        notes.append(f"weights add to {total:g}, normalised: {_in_words(config.names, shares)}")
    if config.temperature != 1:
        shares = tempered(shares, config.temperature)
        notes.append(f"at temperature {config.temperature:g}: {_in_words(config.names, shares)}")
    return WeightPlan(shares, [_stage(i, stage, config.names) for i, stage in enumerate(config.stages)]), notes


def _given_weights(config: MixtureConfig, sizes: Sequence[int | None], notes: list[str]) -> list[float]:
    given = {source.name: source.weight for source in config.sources}
    weightless = [name for name, weight in given.items() if weight is None]
    if 0 < len(weightless) < len(given):
        raise ConfigError(f"source {weightless[0]!r} has no weight, and others do; give every source one, or none")
    if not weightless:
        return [weight or 0.0 for weight in given.values()]
    for name, size in zip(config.names, sizes, strict=True):
        if size is None:
            raise ConfigError(f"source {name!r} is a stream of unknown size; give every source a weight")
    notes.append(f"no weights given: each source by its {config.unit}")
    return [float(size or 0) for size in sizes]


def _preset_weights(config: MixtureConfig, notes: list[str]) -> list[float]:
    preset, parts = f"preset {config.preset!r}", PRESETS[config.preset or ""]
    bind = dict(config.bind) if config.bind is not None else {name: name for name in config.names}
    for source in config.sources:
        if source.weight is not None:
            raise ConfigError(f"source {source.name!r} has a weight, and {preset} gives one; expected one of them")
    check_keys(f"the parts of {preset}", bind, parts)
    for part, name in bind.items():
        check_one_of(f"the source that part {part!r} is bound to", name, config.names)
    for name in config.names:
        if name not in bind.values():
            raise ConfigError(f"source {name!r} stands for no part of {preset}; bind it to one, or take it out")
    if left := [part for part in parts if part not in bind]:
        notes.append(f"preset {config.preset}: no source for {', '.join(left)}, whose share goes to the others")
    return [sum(parts[part] for part, bound in bind.items() if bound == name) for name in config.names]


def _stage(i: int, stage: StageConfig, names: Sequence[str]) -> Stage:
    begin = int(number(f"stage {i}: begin", stage.begin))
    end = begin if stage.end is None else int(number(f"stage {i}: end", stage.end))
    weights = [number(f"stage {i}: weight of {name!r}", stage.weights.get(name, 0)) for name in names]
    try:
        return Stage(begin, normalised(weights, names), end)
    except ConfigError as error:
        raise ConfigError(f"stage {i}: {error}") from None


def _in_words(names: Sequence[str], shares: NDArray[np.float64]) -> str:
    words = [f"{name} {share:.2%}" for name, share in zip(names[:_NAMED], shares[:_NAMED], strict=True)]
    return ", ".join(words) + (f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else "")
