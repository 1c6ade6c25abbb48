"""Sums of nats, tokens and bytes. They add up over batches, sources and processes, and are divided once."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from hf_objectives.distributed import gather_objects


@dataclass(frozen=True, slots=True)
class TokenCount:
    """The negative log-likelihood of predicted tokens.

    Attributes:
        nll: total negative log-likelihood in nats, float64.
        num_tokens: number of predicted tokens.
        num_bytes: UTF-8 bytes that these tokens stand for; special tokens stand for none.
    """

    nll: float = 0.0
    num_tokens: int = 0
    num_bytes: int = 0

    def __add__(self, other: TokenCount) -> TokenCount:
        return TokenCount(self.nll + other.nll, self.num_tokens + other.num_tokens, self.num_bytes + other.num_bytes)

    @property
    def loss(self) -> float:
        """Nats per token, NaN without tokens."""
        return self.nll / self.num_tokens if self.num_tokens else math.nan

    @property
    def perplexity(self) -> float:
        """exp(nats / tokens), the perplexity of Jelinek et al. (1977); infinite where that overflows."""
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf

    @property
    def bits_per_byte(self) -> float:
        """nats / ln 2 / bytes, comparable between tokenizers (Gao et al., arXiv 2101.00027, 3.1); NaN without bytes."""
        return self.nll / math.log(2) / self.num_bytes if self.num_bytes else math.nan

    def metrics(self, prefix: str) -> dict[str, float]:
        """`<prefix>_loss`, `_perplexity`, `_bits_per_byte` and `_num_tokens`."""
        names = ("loss", "perplexity", "bits_per_byte", "num_tokens")
        return {f"{prefix}_{name}": getattr(self, name) for name in names}


@dataclass
class EvaluationCounts:
    """The sums of an evaluation.

    Attributes:
        total: all predicted tokens.
        sources: the predicted tokens of each source, where batches name sources.
        stop_probability: sum of the probability of the stop token, over the ends of trained turns.
        num_stops: number of these ends.
    """

    total: TokenCount = field(default_factory=TokenCount)
    sources: dict[str, TokenCount] = field(default_factory=dict)
    stop_probability: float = 0.0
    num_stops: int = 0

    def add(self, other: EvaluationCounts) -> None:
        """Add other counts to these."""
        self.total = self.total + other.total
        for name, count in other.sources.items():
            self.sources[name] = self.sources.get(name, TokenCount()) + count
        self.stop_probability += other.stop_probability
        self.num_stops += other.num_stops

    def over_ranks(self) -> EvaluationCounts:
        """The sum over all processes."""
        merged = EvaluationCounts()
        for counts in gather_objects(self):
            merged.add(counts)
        return merged

    def metrics(self, prefix: str) -> dict[str, float]:
        """The metrics of all tokens, of stop tokens, and of each source."""
        metrics = self.total.metrics(prefix)
        if self.num_stops:
            metrics[f"{prefix}_stop_probability"] = self.stop_probability / self.num_stops
        for name, count in sorted(self.sources.items()):
            metrics |= count.metrics(f"{prefix}_{name}")
        return metrics


@dataclass(frozen=True, slots=True)
class PerplexityResult:
    """The result of `compute_perplexity`: the figures of a `TokenCount`, and the result of each group of texts."""

    nll: float
    num_tokens: int
    num_bytes: int
    perplexity: float
    bits_per_byte: float
    groups: dict[str, PerplexityResult] = field(default_factory=dict)

    @classmethod
    def of(cls, count: TokenCount, groups: dict[str, TokenCount] | None = None) -> PerplexityResult:
        """The result of a count, and of the counts of its groups."""
        inner = {name: cls.of(part) for name, part in (groups or {}).items()}
        return cls(count.nll, count.num_tokens, count.num_bytes, count.perplexity, count.bits_per_byte, inner)
