"""The summed next-token loss and its gradients from hidden states and the head's weight, in chunks of logits, in plain torch.

Logits are made for a chunk of tokens at a time. Their gradient is made while they are there, so that no tensor of tokens x
vocabulary exists. Liger Kernel (Hsu et al., arXiv 2410.10989) does it this way.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_objectives.errors import ConfigError

#: Bytes of logits that exist at a time, on a CPU and on an accelerator. There the pass over the gradient of the whole weight,
#: one a chunk, costs more beside the products.
CHUNK_BYTES, ACCELERATOR_CHUNK_BYTES = 128 * 2**20, 2**30

#: In place of a logit of -inf, less the highest: that of an entry which a model rules out.
LOWEST = -1000.0


class HeadOptions(NamedTuple):
    """What is summed, and how; see `fused_linear_cross_entropy` and `token_log_probs`. `dtype` is that of the products."""

    dtype: torch.dtype
    softcap: float | None = None
    scale: float = 1.0
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    temperature: float = 1.0
    figures: tuple[str, ...] = ()
    chunk_bytes: int | None = None


def chunked(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, weights: Tensor | None, options: HeadOptions
) -> tuple[Tensor, Tensor]:
    """Compute the loss, a scalar with gradient, and the nats of each token, [tokens], in float32 (of float64 in float64).

    Any device, any dtype, every option. A graph serves one backward pass.
    """
    wants = [torch.is_grad_enabled() and part is not None and part.requires_grad for part in (hidden, weight, bias)]
    return _Chunked.apply(hidden, weight, bias, targets, weights, options, wants)


def products_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype of the head's products: that of autocast where it is on, else that of both tensors."""
    if torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(hidden.device.type)
    if weight.dtype != hidden.dtype:
        raise ConfigError(
            f"hidden states are {hidden.dtype}, the head's weight {weight.dtype}; expected one dtype, or autocast"
        )
    return hidden.dtype


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
        with torch.autocast(hidden.device.type, enabled=False):
            head = ChunkedHead(hidden, weight, bias, options, wants)
            losses, nats = hidden.new_empty((2, len(targets)), dtype=sums_dtype(options.dtype))
            for part in head.chunks():
                own = None if weights is None else weights[part].to(losses.dtype)
                read = head.read(part, targets[part])
                nats[part] = read.nats
                losses[part] = head.losses(read, own)
                if any(wants):
                    head.add(part, targets[part], read, own)
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


class Read(NamedTuple):
    """What was read from the logits of a chunk, in the dtype of sums. The buffers serve one chunk at a time.

    Attributes:
        exponentials: [tokens, entries], exp(logit - highest logit).
        total: [tokens, 1], their sums.
        log_z: [tokens], logsumexp of the logits.
        nats: [tokens], negative log-likelihood of the targets.
        mean: [tokens], mean of the logits; None where nobody wants it.
        shifted: [tokens, entries], logit - highest logit; None where the entropy is not wanted.
        figures: those that the options name, each [tokens].
    """

    exponentials: Tensor
    total: Tensor
    log_z: Tensor
    nats: Tensor
    mean: Tensor | None
    shifted: Tensor | None
    figures: dict[str, Tensor]


class ChunkedHead:
    """The head of one call: buffers for the logits of a chunk, and the gradients so far.

    Attributes:
        gradients: of hidden states, weight and bias; None for those that nobody wants.
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, options: HeadOptions, wants: list[bool]
    ) -> None:
        dtype, sums, (tokens, entries) = options.dtype, sums_dtype(options.dtype), (len(hidden), len(weight))
        self.hidden, self.weight, self.options = hidden.to(dtype), weight.to(dtype), options
        self.bias = None if bias is None else bias.to(dtype)
        copies = 1 + (dtype != sums) + (options.softcap is not None) + ("entropy" in options.figures)
        usual = CHUNK_BYTES if hidden.device.type == "cpu" else ACCELERATOR_CHUNK_BYTES
        most = max(1, (options.chunk_bytes or usual) // (copies * entries * sums.itemsize))
        self.rows = -(-tokens // max(1, -(-tokens // most)))  # chunks of one size
        # One buffer serves all chunks: to the system, fresh memory costs as much as a pass over it.
        self.logits = self.hidden.new_empty((self.rows, entries))
        self.precise = self.logits if dtype == sums else torch.empty_like(self.logits, dtype=sums)
        self.slope = None if options.softcap is None else torch.empty_like(self.precise)
        self.shifted = torch.empty_like(self.precise) if "entropy" in options.figures else None
        self.want(wants)

    def want(self, wants: list[bool]) -> None:
        """Begin the gradients of hidden states, weight and bias that are wanted."""
        make = torch.empty_like if len(self.hidden) else torch.zeros_like
        parts, sums = (self.hidden, self.weight, self.bias), sums_dtype(self.options.dtype)
        self.gradients = [
            make(part, dtype=kind) if part is not None and wanted else None
            for part, kind, wanted in zip(parts, (self.options.dtype, sums, sums), wants, strict=True)
        ]
        self._is_begun = False

    def chunks(self) -> list[slice]:
        """The tokens of each chunk."""
        return [slice(i, min(i + self.rows, len(self.hidden))) for i in range(0, len(self.hidden), max(1, self.rows))]

    def read(self, part: slice, targets: Tensor) -> Read:
        """Make the logits of a chunk and read them."""
        logits, options, target = self._logits(part), self.options, targets.unsqueeze(-1)
        wanted, figures = options.figures, {}
        mean = logits.mean(dim=-1) if options.label_smoothing or "mean_logits" in wanted else None
        if "is_top1" in wanted:
            figures["is_top1"] = logits.argmax(dim=-1) == targets
        highest, of_target = logits.amax(dim=-1, keepdim=True), logits.gather(-1, target)
        logits.sub_(highest)
        shifted = None
        if self.shifted is not None:
            # 0 * -inf is NaN. So far below the highest logit a probability is 0 in float64 too.
            shifted = torch.clamp(logits, min=LOWEST, out=self.shifted[: len(logits)])
        total = logits.exp_().sum(dim=-1, keepdim=True)
        log_total = total.log()
        nats, log_z = (log_total + (highest - of_target)).squeeze(-1), (log_total + highest).squeeze(-1)
        if shifted is not None:
            figures["entropy"] = log_total.squeeze(-1) - torch.linalg.vecdot(logits, shifted) / total.squeeze(-1)
        if "log_sum_sq_probs" in wanted:
            figures["log_sum_sq_probs"] = torch.linalg.vecdot(logits, logits).log() - 2 * log_total.squeeze(-1)
        if mean is not None and "mean_logits" in wanted:
            figures["mean_logits"] = mean
        return Read(logits, total, log_z, nats, mean, shifted, figures)

    def losses(self, read: Read, weights: Tensor | None) -> Tensor:
        """Each token's loss, [tokens]."""
        losses, options = read.nats.clone(), self.options
        if options.label_smoothing and read.mean is not None:
            losses.mul_(1 - options.label_smoothing).add_(read.log_z - read.mean, alpha=options.label_smoothing)
        if options.z_loss:
            losses.add_(read.log_z.square(), alpha=options.z_loss)
        return losses if weights is None else losses.mul_(weights)

    def add(
        self, part: slice, targets: Tensor, read: Read, weights: Tensor | None, entropy_weights: Tensor | None = None
    ) -> None:
        """Add a chunk's gradients of `weights` times the losses, plus `entropy_weights` times the entropies."""
        options, (logits, total) = self.options, read[:2]
        # `logits` hold `total` times the probabilities; from here on, their own gradient divided by `factor`.
        if options.z_loss:
            logits.mul_((1 + 2 * options.z_loss * read.log_z).unsqueeze(-1))
        of_target = (options.label_smoothing - 1) * total
        if entropy_weights is not None and weights is not None and read.shifted is not None:
            # d H / d logit = -p (log p + H)
            slope = read.shifted.add_(read.figures["entropy"].unsqueeze(-1) - total.log())
            logits.mul_(slope.mul_(-entropy_weights.unsqueeze(-1)).add_(weights.unsqueeze(-1)))
            of_target, weights = of_target * weights.unsqueeze(-1), None
        logits.scatter_add_(-1, targets.unsqueeze(-1), of_target)
        if options.label_smoothing:
            logits.sub_(total * (options.label_smoothing / logits.shape[-1]))
        if self.slope is not None:
            logits.mul_(self.slope[: len(logits)])
        factor = options.scale / options.temperature / total
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
        return logits if options.temperature == 1 else logits.div_(options.temperature)

    def _add_gradients(self, part: slice, logits: Tensor, factor: Tensor) -> None:
        """Add the gradients that follow from that of the logits, which is `factor` times what `logits` hold."""
        hidden, (of_hidden, of_weight, of_bias) = self.hidden[part], self.gradients
        later, self._is_begun = int(self._is_begun), True  # the first chunk is written, the others are added
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
