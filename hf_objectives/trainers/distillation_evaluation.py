"""The rows of an evaluation of distillation, each once, and figures that do not depend on their batches."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hf_objectives.distributed import gather_objects, rank, world_size
from hf_objectives.evaluation import TokenCount

#: Two kinds of answers.
OWN, GIVEN = "own", "given"


class RowSums(NamedTuple):
    """Sums over the trained tokens of rows, each [rows].

    Attributes:
        tokens: number of tokens.
        divergence: of the student to the teacher, in nats.
        entropy: of the student, in nats.
        nats: negative log-likelihood of the tokens under the student.
        teacher_nats: the same under the teacher.
        num_bytes: bytes of text that the tokens stand for.
        is_cut: whether an answer of the student's reached the bound of tokens.
    """

    tokens: NDArray[np.float64]
    divergence: NDArray[np.float64]
    entropy: NDArray[np.float64]
    nats: NDArray[np.float64]
    teacher_nats: NDArray[np.float64]
    num_bytes: NDArray[np.float64]
    is_cut: NDArray[np.float64]


class EvaluatedRows:
    """The rows of an evaluation in their order, without those that fill up a last batch.

    Args:
        total: number of all rows.
    """

    def __init__(self, total: int) -> None:
        self.total, self._begun = total, 0
        self._parts: dict[str, list[NDArray[np.float64]]] = {OWN: [], GIVEN: []}

    def next_numbers(self, n: int) -> range:
        """Numbers of the next `n` rows of this process, where every process has as many."""
        begin, self._begun = self._begun + rank() * n, self._begun + world_size() * n
        return range(begin, begin + n)

    def add(self, kind: str, numbers: range, sums: RowSums) -> None:
        """Add the sums of answers to rows."""
        self._parts[kind].append(np.stack([np.array(numbers, np.float64), *sums]))

    def over_ranks(self) -> dict[str, RowSums]:
        """The rows of all processes by kind, in the order of their numbers."""
        found = {}
        for kind, parts in self._parts.items():
            columns = [part for of_rank in gather_objects(parts) for part in of_rank]
            if columns:
                whole = np.concatenate(columns, axis=1)
                _, first = np.unique(whole[0], return_index=True)
                found[kind] = RowSums(*whole[1:, first[: self.total]])
        return found


def figures_of(rows: dict[str, RowSums], lmbda: float) -> dict[str, float]:
    """Figures of an evaluation: sums over all tokens by their number.

    Args:
        rows: the rows of all processes by kind.
        lmbda: share of the student's own answers in the loss.
    """
    figures: dict[str, float] = {}
    losses = {kind: _ratio(sums.divergence, sums.tokens) for kind, sums in rows.items()}
    if (given := rows.get(GIVEN)) is not None:
        number = int(given.tokens.sum())
        count = TokenCount(float(given.nats.sum()), number, int(given.num_bytes.sum()))
        teacher = TokenCount(float(given.teacher_nats.sum()), number)
        figures |= {
            "perplexity": count.perplexity,
            "bits_per_byte": count.bits_per_byte,
            "num_tokens": number,
            "teacher_perplexity": teacher.perplexity,
            "divergence": losses[GIVEN],
        }
    if (own := rows.get(OWN)) is not None:
        figures |= {"on_policy_divergence": losses[OWN], "entropy": _ratio(own.entropy, own.tokens)}
        ended = own.tokens[own.is_cut == 0]
        figures |= _of_lengths("length", own.tokens)
        figures |= _of_lengths("terminated_length", ended if len(ended) else np.zeros(1))
        figures["completions/clipped_ratio"] = float(own.is_cut.mean())
    weights = {OWN: lmbda, GIVEN: 1 - lmbda}
    figures["loss"] = sum(weight * losses[kind] for kind, weight in weights.items() if weight)
    return figures


def _ratio(nats: NDArray[np.float64], tokens: NDArray[np.float64]) -> float:
    return float(nats.sum() / tokens.sum()) if tokens.sum() else float("nan")


def _of_lengths(name: str, lengths: NDArray[np.float64]) -> dict[str, float]:
    return {f"completions/{kind}_{name}": float(getattr(lengths, kind)()) for kind in ("mean", "min", "max")}
