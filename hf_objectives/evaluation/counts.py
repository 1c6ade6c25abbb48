"""Perplexity from sums: nats, tokens and bytes add up over batches, sources and processes, and are divided once."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class TokenCount:
    """Predicted tokens and what they cost.

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
        """nats / ln 2 / bytes, which compares tokenizers (Gao et al., arXiv 2101.00027, section 3.1); NaN without bytes."""
        return self.nll / math.log(2) / self.num_bytes if self.num_bytes else math.nan


@dataclass(frozen=True, slots=True)
class PerplexityResult:
    """What `compute_perplexity` returns.

    Attributes:
        nll: total nats.
        num_tokens: number of predicted tokens.
        num_bytes: bytes that these tokens stand for.
        perplexity: exp(nll / num_tokens).
        bits_per_byte: nll / ln 2 / num_bytes.
        groups: the same per group, where texts were grouped.
    """

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
