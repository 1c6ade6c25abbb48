"""Candidates of a search for the best weights: mixtures to try, drawn around a prior."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hf_objectives.errors import ConfigError
from hf_objectives.mixture.schedule import normalised


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
