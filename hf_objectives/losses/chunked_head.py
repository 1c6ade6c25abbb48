"""The summed next-token loss and its gradients from hidden states and the head's weight, in chunks of logits, in plain torch.

Logits are made for a chunk of tokens at a time. Their gradient is made while they are there, so that no tensor of tokens x
vocabulary exists. Liger Kernel (Hsu et al., arXiv 2410.10989) does it this way.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_objectives.errors import ConfigError

#: Bytes of logits that exist at a time.
CHUNK_BYTES = 128 * 2**20


class HeadOptions(NamedTuple):
    """What is summed, and how; see `fused_linear_cross_entropy`. `dtype` is that of the products."""

    label_smoothing: float
    z_loss: float
    softcap: float | None
    scale: float
    dtype: torch.dtype
    chunk_bytes: int


def chunked(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, weights: Tensor | None, options: HeadOptions
) -> tuple[Tensor, Tensor]:
    """Compute the loss, a scalar with gradient, and the nats of each token, [tokens], in float32 (of float64 in float64).

    Any device, any dtype, every option. A graph serves one backward pass.
    """
    wants = [torch.is_grad_enabled() and part is not None and part.requires_grad for part in (hidden, weight, bias)]
    return _Chunked.apply(hidden, weight, bias, targets, weights, options, wants)


def sums_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


class _Chunked(torch.autograd.Function):
    """The gradients of the loss are ready when it is."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        weights: Tensor | None,
        options: HeadOptions,
        wants: list[bool],
    ) -> tuple[Tensor, Tensor]:
        dtype = options.dtype
        with torch.autocast(hidden.device.type, enabled=False):
            parts = (hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
            head = _Head(*parts, options, wants)
            losses, nats = hidden.new_empty((2, len(targets)), dtype=sums_dtype(dtype))
            for part in head.chunks():
                own = None if weights is None else weights[part].to(losses.dtype)
                head.add(part, targets[part], own, losses[part], nats[part])
        ctx.gradients = head.gradients
        ctx.mark_non_differentiable(nats)
        return losses.sum(), nats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise ConfigError(
                "backward() ran twice through fused_linear_cross_entropy, which keeps its gradients for one pass; compute "
                "the loss again for each"
            )
        # They are changed in place, and so used up: a copy of the weight's would be large.
        gradients, ctx.gradients = ctx.gradients, None
        return *(None if part is None else part.mul_(gradient) for part in gradients), None, None, None, None


class _Head:
    """The head of one call: a buffer for the logits of a chunk, and the gradients so far."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, options: HeadOptions, wants: list[bool]
    ) -> None:
        self.hidden, self.weight, self.bias, self.options, self.wants = hidden, weight, bias, options, wants
        sums, (tokens, entries) = sums_dtype(hidden.dtype), (len(hidden), len(weight))
        copies = 1 + (hidden.dtype != sums) + (options.softcap is not None)
        most = max(1, options.chunk_bytes // (copies * entries * sums.itemsize))
        self.rows = -(-tokens // max(1, -(-tokens // most)))  # chunks of one size
        # One buffer serves all chunks: to the system, fresh memory costs as much as a pass over it.
        self.logits = hidden.new_empty((self.rows, entries))
        self.precise = self.logits if hidden.dtype == sums else torch.empty_like(self.logits, dtype=sums)
        self.slope = None if options.softcap is None else torch.empty_like(self.precise)
        make = torch.empty_like if tokens else torch.zeros_like
        kinds = (hidden.dtype, sums, sums)
        self.gradients = [
            make(part, dtype=kind) if part is not None and wanted else None
            for part, kind, wanted in zip((hidden, weight, bias), kinds, wants, strict=True)
        ]

    def chunks(self) -> Iterator[slice]:
        """The tokens of each chunk."""
        return (slice(i, min(i + self.rows, len(self.hidden))) for i in range(0, len(self.hidden), max(1, self.rows)))

    def add(self, part: slice, targets: Tensor, weights: Tensor | None, losses: Tensor, nats: Tensor) -> None:
        """Write losses and nats of the tokens of a chunk, and add its gradients."""
        options, target = self.options, targets.unsqueeze(-1)
        logits = self._logits(part)
        mean = logits.mean(dim=-1) if options.label_smoothing else None
        highest, of_target = logits.amax(dim=-1, keepdim=True), logits.gather(-1, target)
        total = logits.sub_(highest).exp_().sum(dim=-1, keepdim=True)
        log_total = total.log()
        torch.add(log_total, highest - of_target, out=nats.unsqueeze(-1))
        log_z = (log_total + highest).squeeze(-1)
        losses.copy_(nats)
        if mean is not None:
            losses.mul_(1 - options.label_smoothing).add_(log_z - mean, alpha=options.label_smoothing)
        if options.z_loss:
            losses.add_(log_z.square(), alpha=options.z_loss)
        if weights is not None:
            losses.mul_(weights)
        if not any(self.wants):
            return
        # `logits` hold `total` times the probabilities; from here on, their own gradient divided by `factor`.
        if options.z_loss:
            logits.mul_((1 + 2 * options.z_loss * log_z).unsqueeze(-1))
        logits.scatter_add_(-1, target, (options.label_smoothing - 1) * total)
        if mean is not None:
            logits.sub_(total * (options.label_smoothing / logits.shape[-1]))
        if self.slope is not None:
            logits.mul_(self.slope[: len(logits)])
        factor = options.scale / total
        self._add_gradients(part, logits, factor if weights is None else factor * weights.unsqueeze(-1))

    def _logits(self, part: slice) -> Tensor:
        """The model's logits of a chunk, in the dtype of sums."""
        hidden, options = self.hidden[part], self.options
        product, logits = self.logits[: len(hidden)], self.precise[: len(hidden)]
        if self.bias is None:
            torch.mm(hidden, self.weight.t(), out=product)
        else:
            torch.addmm(self.bias, hidden, self.weight.t(), out=product)
        if logits.dtype != product.dtype:
            logits.copy_(product)
        if options.scale != 1:
            logits.mul_(options.scale)
        if options.softcap is not None and self.slope is not None:
            logits.div_(options.softcap).tanh_()
            torch.mul(logits, logits, out=self.slope[: len(hidden)]).neg_().add_(1)
            logits.mul_(options.softcap)
        return logits

    def _add_gradients(self, part: slice, logits: Tensor, factor: Tensor) -> None:
        """Add the gradients that follow from that of the logits, which is `factor` times what `logits` hold."""
        hidden, (of_hidden, of_weight, of_bias) = self.hidden[part], self.gradients
        later = int(part.start > 0)  # the first chunk is written, the others are added
        product, is_narrow = self.logits[: len(hidden)], hidden.dtype != logits.dtype
        if is_narrow:
            product.copy_(logits.mul_(factor))
            factor = torch.ones_like(factor)
        if of_bias is not None:
            torch.addmv(of_bias, logits.t(), factor.squeeze(-1), beta=later, out=of_bias)
        if of_hidden is not None:
            torch.mm(product, self.weight, out=of_hidden[part])
            if not is_narrow:  # the factor goes to the smaller side of the product
                of_hidden[part].mul_(factor)
        if of_weight is None:
            return
        if is_narrow and hidden.device.type == "cuda":
            torch.addmm(of_weight, product.t(), hidden, beta=later, out_dtype=of_weight.dtype, out=of_weight)
        else:
            of_weight.addmm_(logits.t(), hidden * factor, beta=later)
