"""From the rewards of an answer to its score, with those of reward models on one scale."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_objectives.distributed import sum_over_ranks
from hf_objectives.losses import Moments, whiten
from hf_objectives.trainers.metrics import over_ranks


class ScoreScale:
    """Scales the scores of reward models by mean and standard deviation of all training answers so far.

    A loss over pairs fixes neither the level of a reward model's scores nor, in practice, their spread (Ziegler et al. 2019,
    arXiv 1909.08593, section 2.1, normalise their model once). Functions keep the scale that their author gave them.

    Args:
        models: places of the reward models among the reward functions.
    """

    def __init__(self, models: Iterable[int]) -> None:
        self.moments = {i: Moments(0.0, 0.0, 0.0) for i in models}

    def add(self, rewards: Tensor) -> None:
        """Count training answers; all ranks call it.

        Args:
            rewards: float [answers, functions] of this rank, NaN without.
        """
        for i, known in self.moments.items():
            new = over_ranks(Moments.of(rewards[:, i], ~rewards[:, i].isnan()))
            self.moments[i] = Moments(*(a + b for a, b in zip(known, new, strict=True)))

    def scaled(self, rewards: Tensor) -> Tensor:
        """The rewards with those of models scaled, by the answers counted so far; before the first ones as they are."""
        scaled = rewards.clone()
        for i, known in self.moments.items():
            if known.number:
                scaled[:, i] = whiten(rewards[:, i], known)
        return scaled

    def state_dict(self) -> dict[int, list[float]]:
        """For a checkpoint."""
        return {i: [*moments] for i, moments in self.moments.items()}

    def load_state_dict(self, state: Mapping[int, list[float]]) -> None:
        """Go on from `state_dict`."""
        self.moments.update({i: Moments(*state[i]) for i in self.moments if i in state})


@dataclass
class AnswerScores:
    """The scores of answers from their rewards.

    Args:
        scale: of the rewards of models.
        weights: float [functions].
        clip: bounds of a score, before the penalty; None for none.
        missing_eos_penalty: taken off the score of an answer that did not stop.
        stops: ids of stop tokens.
    """

    scale: ScoreScale
    weights: Tensor
    clip: tuple[float, float] | None
    missing_eos_penalty: float
    stops: Sequence[int]

    @classmethod
    def for_run(cls, trainer: Any) -> AnswerScores:
        """Those of a `PPOTrainer`, by its reward functions and settings."""
        args = trainer.args
        models = [i for i, function in enumerate(trainer.reward_funcs) if isinstance(function, nn.Module)]
        scale = ScoreScale(models if args.normalize_reward_models else ())
        weights, clip = trainer.reward_weights, trainer.reward_clip_range
        return cls(scale, weights, clip, args.missing_eos_penalty, trainer.eos_token_ids)

    def of(
        self, rewards: Tensor, ids: Tensor, mask: Tensor, new: Tensor, *, trains: bool
    ) -> tuple[Tensor, Tensor, dict[str, float]]:
        """Score the answers of this rank; all ranks call it.

        Args:
            rewards: float [batch, functions], NaN without.
            ids, mask: [batch, length], the tokens of the answers and where they are.
            new: bool [batch], False for a repetition of an answer that counts already.
            trains: whether the answers are trained on; the scale counts those.

        Returns:
            Scores, float32 [batch]; whether each answer has one, bool [batch]; figures of all ranks for the log.
        """
        if trains:
            self.scale.add(rewards)
        scored = ~torch.isnan(rewards).all(dim=1) & new.to(rewards.device)
        scores = (self.scale.scaled(rewards) * self.weights.to(rewards.device)).nansum(dim=1)
        if self.clip:
            scores = scores.clamp(*self.clip)
        stops = torch.tensor(self.stops, device=ids.device)
        finished = (torch.isin(ids, stops) & mask.bool()).any(dim=1)
        scores = scores - self.missing_eos_penalty * ~finished
        done, total, missing = sum_over_ranks([float(finished.sum()), float(len(ids)), float((~scored).sum())])
        return scores, scored, {"completions/finished": done / total, "rewards/missing": missing}
