"""The answers of an evaluation of PPO, each once, and figures that do not depend on their batches."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from hf_objectives.distributed import gather_objects, rank


class Answer(NamedTuple):
    """What an evaluation keeps of an answer.

    Attributes:
        length: its tokens.
        is_cut: whether it reached the bound of tokens.
        has_stop: whether it ended with a stop token.
        rewards: one of each function, NaN without.
        log_ratio: log π - log π_ref, nats over its tokens; None without a reference.
        kl: the same of the estimator.
    """

    length: int
    is_cut: bool
    has_stop: bool
    rewards: list[float]
    log_ratio: float | None
    kl: float | None


@dataclass
class EvaluatedAnswers:
    """Answers of all processes, in the order of the prompts, without the rows that a last batch repeats.

    Args:
        names: of the reward functions.
        weights: float [functions].
    """

    names: list[str]
    weights: Tensor
    answers: list[Answer] = field(default_factory=list)
    total: int | None = None

    def begin(self, total: int | None) -> None:
        """Begin an evaluation of so many answers; None if that is not known, as of a stream."""
        self.answers, self.total = [], total

    def next_numbers(self, n: int) -> range:
        """Numbers of the next `n` answers of this process, where every process has as many."""
        begin = len(self.answers) + rank() * n
        return range(begin, begin + n)

    def is_new(self, number: int) -> bool:
        """Whether an answer is no repetition of one before, with which a last batch is filled up."""
        return self.total is None or number < self.total

    def add(
        self,
        ids: Tensor,
        mask: Tensor,
        rewards: Tensor,
        log_ratio: Tensor | None,
        kl: Tensor | None,
        *,
        stops: list[int],
        pad: int,
    ) -> None:
        """Add the next answers of this process.

        Args:
            ids, mask: [n, length], tokens of the answers and where they are.
            rewards: float [n, functions], NaN without.
            log_ratio, kl: log π - log π_ref and the KL estimate of each token, [n, length]; None without a reference.
            stops: stop tokens.
            pad: the padding token, which TRL takes for an end too.
        """
        stop, lengths = torch.tensor(stops, device=ids.device), mask.sum(dim=1)
        last = ids.gather(1, lengths[:, None] - 1)[:, 0]
        columns = [
            lengths,
            ~torch.isin(last, stop) & (last != pad),
            (torch.isin(ids, stop) & mask.bool()).any(dim=1),
            rewards,
            *([None] * len(ids) if one is None else (one * mask).sum(dim=1) for one in (log_ratio, kl)),
        ]
        rows = zip(*[one.tolist() if isinstance(one, Tensor) else one for one in columns], strict=True)
        self.answers += [Answer(*row) for part in gather_objects([*rows]) for row in part]

    def figures(self, generations: int, clip: tuple[float, float] | None, beta: float) -> dict[str, float]:
        """TRL's figures of a batch of answers and those of `PPOTrainer`, as if all answers were one batch.

        Args:
            generations: number of answers to each prompt, which follow each other.
            clip: bounds of the score.
            beta: coefficient of the KL penalty in RLOO's rewards, whose variation within a prompt is counted.
        """
        answers = self.answers[: self.total]
        if not answers:
            return {}
        lengths = torch.tensor([float(answer.length) for answer in answers])
        ends = torch.tensor([not answer.is_cut for answer in answers])
        rewards = torch.tensor([answer.rewards for answer in answers])
        missing = rewards.isnan().all(dim=1)
        score = (rewards * self.weights.to(rewards.device)).nansum(dim=1)
        score[missing] = torch.nan
        figures = {
            **_of_lengths("length", lengths),
            **_of_lengths("terminated_length", lengths[ends] if ends.any() else torch.zeros(1)),
            "completions/clipped_ratio": float((~ends).float().mean()),
            "completions/finished": sum(answer.has_stop for answer in answers) / len(answers),
            "rewards/missing": float(missing.sum()),
            "reward": float(score.nanmean()),
            "reward_std": _std(score),
        }
        for i, name in enumerate(self.names):
            figures[f"rewards/{name}/mean"] = float(rewards[:, i].nanmean())
            figures[f"rewards/{name}/std"] = _std(rewards[:, i])
        if clip:
            score = score.clamp(*clip)
        if answers[0].kl is not None:
            log_ratios, kl = (torch.tensor([answer[i] for answer in answers]) for i in (-2, -1))
            figures["kl"] = float(log_ratios.double().sum() / lengths.double().sum())
            figures["kl_per_answer"] = float(kl.double().mean())
            score = score - beta * log_ratios
        spread = [0.0 if generations == 1 else _std(group) for group in score.split(generations)]
        figures["frac_reward_zero_std"] = sum(abs(one) <= 1e-8 for one in spread) / len(spread)
        return figures


def _of_lengths(name: str, lengths: Tensor) -> dict[str, float]:
    kinds = {"mean": lengths.mean(), "min": lengths.min(), "max": lengths.max()}
    return {f"completions/{kind}_{name}": float(value) for kind, value in kinds.items()}


def _std(values: Tensor) -> float:
    """Of a sample, without those that are missing; NaN of fewer than two."""
    kept = values[~values.isnan()]
    return float(kept.std()) if len(kept) > 1 else float("nan")
