"""Log-probabilities of single tokens, and entropies, from hidden states and the head's weight, without all logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_objectives.losses.chunked_head import LOWEST, ChunkedHead, HeadOptions, products_dtype, sums_dtype
from hf_objectives.types import check_one_of


class TokenScores(NamedTuple):
    """What a model says of single tokens, each [tokens], in float32 (of float64 in float64); None where it is not asked for.

    Attributes:
        log_probs: log-probability of each target, with gradient.
        entropy: that of the distribution of the target, in nats, with gradient.
        log_sum_sq_probs: log of the sum of squared probabilities.
        mean_logits: mean of the logits, divided by the temperature.
        is_top1: bool, whether no other entry has a higher logit.
    """

    log_probs: Tensor
    entropy: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None


FIGURES = TokenScores._fields[1:]


@torch.compiler.disable
def token_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    temperature: float = 1.0,
    figures: Sequence[str] = (),
    chunk_bytes: int | None = None,
) -> TokenScores:
    """Compute log softmax(cap(scale * (hidden @ weight.T + bias)) / temperature) at the targets, in chunks.

    The backward pass makes the logits of each chunk again, since the gradient of a token is known only then. It does not
    where one chunk holds all tokens, whose logits are kept, nor under a head that is not trained, whose gradients of hidden
    states are made at once (those of entropies are not). Dtypes and `torch.compile`: see `fused_linear_cross_entropy`.

    Args:
        hidden: [tokens, width], any float dtype.
        weight: [vocabulary, width], the head's.
        targets: int64 [tokens], entries of the head.
        bias: [vocabulary], the head's.
        softcap: c of `cap(x) = c * tanh(x / c)`; None for none.
        scale: factor of the logits.
        temperature: what the logits are divided by, after the cap.
        figures: names of what to compute beside log-probabilities, see `TokenScores`.
        chunk_bytes: bytes of logits that exist at a time; None for 128 MiB, and 1 GiB on an accelerator.

    Raises:
        ConfigError: hidden states and weight of different dtypes outside autocast.
    """
    for name in figures:
        check_one_of("figures", name, FIGURES)
    dtype = products_dtype(hidden, weight)
    options = HeadOptions(dtype, softcap, scale, temperature=temperature, figures=(*figures,), chunk_bytes=chunk_bytes)
    wants = [torch.is_grad_enabled() and part is not None and part.requires_grad for part in (hidden, weight, bias)]
    nats, *found = _TokenScores.apply(hidden, weight, bias, targets, options, wants)
    return TokenScores(-nats, **dict(zip(FIGURES, found, strict=True)))


def scores_of_logits(
    logits: Tensor, targets: Tensor, *, temperature: float = 1.0, figures: Sequence[str] = ()
) -> TokenScores:
    """Compute what `token_log_probs` does from logits [tokens, vocabulary], for models whose head is not known."""
    logits = logits.to(sums_dtype(logits.dtype)) / temperature
    every = torch.log_softmax(logits, dim=-1)
    ways = {
        "entropy": lambda: -(every.exp() * every.clamp(min=LOWEST)).sum(dim=-1),
        "log_sum_sq_probs": lambda: torch.logsumexp(2 * every.detach(), dim=-1),
        "mean_logits": lambda: logits.detach().mean(dim=-1),
        "is_top1": lambda: logits.argmax(dim=-1) == targets,
    }
    found = {name: ways[name]() for name in figures}
    return TokenScores(every.gather(-1, targets.unsqueeze(-1)).squeeze(-1), **found)


class _TokenScores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        options: HeadOptions,
        wants: list[bool],
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        ctx.options, ctx.wants, ctx.kept = options, wants, None
        # Under a head that is not trained, a token's gradient is a vector that is known here, times the one that comes.
        alone = wants[0] and not any(wants[1:])
        parts: list[tuple[Tensor, dict[str, Tensor]]] = []
        with torch.autocast(hidden.device.type, enabled=False):
            head = ChunkedHead(hidden, weight, bias, options, wants if alone else [False] * 3)
            chunks = head.chunks()
            for part in chunks:
                read = head.read(part, targets[part])
                parts.append((read.nats, read.figures))
                if alone:
                    head.add(part, targets[part], read, None)
        if any(wants):
            ctx.save_for_backward(hidden, weight, bias, targets, head.gradients[0])
            if len(chunks) == 1 and not alone:
                ctx.kept = head, read
        nothing = hidden.new_empty(0, dtype=sums_dtype(options.dtype))
        nats = torch.cat([nothing, *(nats for nats, _ in parts)])
        none = {name: nothing.bool() if name == "is_top1" else nothing for name in options.figures}
        figures = {name: torch.cat([none[name], *(found[name] for _, found in parts)]) for name in none}
        ctx.mark_non_differentiable(*(value for name, value in figures.items() if name != "entropy"))
        return nats, *(figures.get(name) for name in FIGURES)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_nats: Tensor | None, of_entropy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, unit = ctx.saved_tensors
        if of_nats is None:
            if of_entropy is None:
                return (None,) * 6
            of_nats = torch.zeros_like(of_entropy)
        elif unit is not None and of_entropy is None:
            return unit * of_nats.unsqueeze(-1).to(unit.dtype), None, None, None, None, None
        # What is kept is used up: a second backward pass through the graph makes the logits again.
        (head, read), ctx.kept = ctx.kept or (None, None), None
        options = ctx.options._replace(figures=() if of_entropy is None else ("entropy",))
        with torch.autocast(hidden.device.type, enabled=False):
            if head is None:
                head = ChunkedHead(hidden, weight, bias, options, ctx.wants)
            else:
                head.want(ctx.wants)
            for part in head.chunks():
                read = read or head.read(part, targets[part])
                head.add(part, targets[part], read, of_nats[part], None if of_entropy is None else of_entropy[part])
                read = None
        return *head.gradients, None, None, None
