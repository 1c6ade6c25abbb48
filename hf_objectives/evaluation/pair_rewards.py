"""The rewards of preference pairs, and the metrics of a reward model over them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from hf_objectives.errors import DataError, NonFiniteError
from hf_objectives.evaluation.calibration import Reliability, reliability, wilson_interval

_Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class PairRewards:
    """Rewards of `n` preference pairs, each an array [n].

    Attributes:
        row: int64, number of the row in its dataset.
        chosen, rejected: float64, the reward of each answer.
        chosen_length, rejected_length: int64, tokens of each answer without the prompt.
        target: float64, the margin that the loss asks for; 0 where the rows have none.
    """

    row: NDArray[np.int64]
    chosen: _Floats
    rejected: _Floats
    chosen_length: NDArray[np.int64]
    rejected_length: NDArray[np.int64]
    target: _Floats

    @classmethod
    def of_ranks(cls, parts: Iterable[PairRewards]) -> PairRewards:
        """Join the pairs of all ranks in the order of their rows, each row once.

        Ranks repeat rows so that all have as many batches. The first copy of a row counts.
        """
        parts = list(parts)
        joined = {field.name: np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)}
        _, first = np.unique(joined["row"], return_index=True)
        return cls(**{name: values[first] for name, values in joined.items()})

    @property
    def margin(self) -> _Floats:
        """float64 [n], the chosen answer's reward minus the rejected one's."""
        return self.chosen - self.rejected

    def reliability(self, *, bins: int = 10) -> Reliability:
        """Compare confidence with accuracy; see `calibration.reliability`."""
        return reliability(self.margin, bins=bins)

    def metrics(self, *, center: float | None = None) -> dict[str, float]:
        """Compute the metrics of an evaluation; `RewardModelTrainer` describes the keys.

        Args:
            center: weight in the loss of the squared sum of a pair's rewards, `center_rewards_coefficient`.

        Raises:
            NonFiniteError: a reward is not finite; names its row.
            DataError: there is no pair.
        """
        n = len(self.row)
        if not n:
            raise DataError("no preference pair to evaluate on; expected at least one")
        finite = np.isfinite(self.chosen) & np.isfinite(self.rejected)
        if not finite.all():
            i = int(np.flatnonzero(~finite)[0])
            raise NonFiniteError(
                f"row {self.row[i]}: rewards {self.chosen[i]} of the chosen and {self.rejected[i]} of the rejected answer; "
                f"expected finite rewards ({n - int(finite.sum())} such rows of {n})"
            )
        margin = self.margin
        ties = int((margin == 0).sum())
        wins = int((margin > 0).sum()) + ties / 2
        low, high = wilson_interval(wins, n)
        loss = np.logaddexp(0, self.target - margin).mean()  # -log sigmoid(margin - target)
        if center is not None:
            loss += center * np.square(self.chosen + self.rejected).mean()
        rewards = np.concatenate([self.chosen, self.rejected])
        return {
            "loss": float(loss),
            "accuracy": wins / n,
            "accuracy_low": low,
            "accuracy_high": high,
            "ties": ties,
            "margin": float(margin.mean()),
            "min_reward": float(rewards.min()),
            "mean_reward": float(rewards.mean()),
            "max_reward": float(rewards.max()),
            "expected_calibration_error": self.reliability().expected_calibration_error,
            "num_pairs": n,
            **self._length_metrics(rewards),
        }

    def _length_metrics(self, rewards: _Floats) -> dict[str, float]:
        """Metrics of length where they are defined: a correlation needs several lengths and rewards."""
        from scipy.stats import ConstantInputWarning, spearmanr  # takes half a second to import

        lengths = np.concatenate([self.chosen_length, self.rejected_length])
        with warnings.catch_warnings(action="ignore", category=ConstantInputWarning):
            found = {"length_bias": float(spearmanr(rewards, lengths).statistic)}
        longer = self.chosen_length - self.rejected_length
        different = longer != 0
        if different.any():
            found["longer_accuracy"] = float((longer[different] > 0).mean())
            found["longer_preferred"] = float((np.sign(self.margin * longer)[different] / 2 + 0.5).mean())
        return {name: value for name, value in found.items() if not math.isnan(value)}
