"""Head and loss in one: from hidden states and the head's weight to the summed next-token loss, without all logits."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from hf_objectives.errors import ConfigError, DataError
from hf_objectives.losses.chunked_head import HeadOptions, chunked, products_dtype, sums_dtype
from hf_objectives.losses.next_token import LossSum
from hf_objectives.types import IGNORE_INDEX, check_one_of


class Implementation(NamedTuple):
    """A way to compute the loss.

    Attributes:
        compute: as `chunked`, from tensors and options to the loss and the nats of each token.
        lacks: device and options to what it lacks for them; None where it can compute them.
    """

    compute: Callable[[Tensor, Tensor, Tensor | None, Tensor, Tensor | None, HeadOptions], tuple[Tensor, Tensor]]
    lacks: Callable[[torch.device, HeadOptions], str | None]


@torch.compiler.disable
def fused_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    scale: float = 1.0,
    implementation: str | None = None,
    chunk_bytes: int | None = None,
    trusted: bool = False,
) -> LossSum:
    """Compute `next_token_loss` of the logits `cap(scale * (hidden @ weight.T + bias))`, and its gradients, in chunks.

    Products are in the dtype of `hidden`, under autocast in that of autocast. Everything after them is in float32 (of
    float64 in float64), the sums of the weight's gradient too. Three products of the head are computed, and two where its
    weight needs no gradient. A graph serves one backward pass. `torch.compile` calls it as it is.

    Args:
        hidden: [tokens, width], any float dtype.
        weight: [vocabulary, width], the head's.
        targets: int64 [tokens]; tokens with -100 are left out.
        bias: [vocabulary], the head's.
        weights, label_smoothing, z_loss: see `next_token_loss`.
        softcap: c of `cap(x) = c * tanh(x / c)`, as in Gemma 2; None for none.
        scale: factor of the logits.
        implementation: a name of `IMPLEMENTATIONS`; None for the one that was fastest (`benchmarks/RESULTS.md`).
        chunk_bytes: bytes of logits that exist at a time, for "chunked"; None for 128 MiB, and 1 GiB on an accelerator.
        trusted: whether all targets are known to be entries of the head. Then nothing is read from the device, and a target
            that is no entry makes its nats and the loss NaN.

    Returns:
        The sums of `next_token_loss`; `token_nll` is 0 where the target is -100.

    Raises:
        DataError: a target outside the head's entries.
        ConfigError: an implementation that is not known, not installed, or not made for the device or the options; hidden
            states and weight of different dtypes outside autocast.
    """
    kept = None
    if not trusted:
        check_targets(targets, weight.shape[0])
        kept = targets != IGNORE_INDEX
        hidden, targets, weights = hidden[kept], targets[kept], None if weights is None else weights[kept]
    dtype = products_dtype(hidden, weight)
    options = HeadOptions(dtype, softcap, scale, label_smoothing, z_loss, chunk_bytes=chunk_bytes)
    compute = _chosen(implementation, hidden.device, options).compute
    entries = weight.shape[0]
    loss, nats = compute(hidden, weight, bias, targets.clamp(0, entries - 1), weights, options)
    lost = torch.where((targets < 0) | (targets >= entries), torch.nan, 0.0).to(nats.dtype)
    nats = nats + lost
    number = nats.new_tensor(float(len(nats))) if weights is None else weights.to(nats.dtype).sum()
    each = nats if kept is None else nats.new_zeros(kept.shape).masked_scatter_(kept, nats)
    return LossSum(loss + lost.sum(), nats.sum(), number, each)


def check_targets(targets: Tensor, entries: int) -> None:
    """Check that targets are entries of the head.

    Args:
        targets: int64 [tokens] or [rows, tokens], -100 where nothing is predicted.
        entries: the head's.

    Raises:
        DataError: names row, token and id of the first target that is none.
    """
    wrong = ((targets < 0) & (targets != IGNORE_INDEX)) | (targets >= entries)
    if bool(wrong.any()):
        place = wrong.nonzero()[0].tolist()
        raise DataError(
            f"token {place[-1]} is to predict id {int(targets[tuple(place)])}; expected 0 to {entries - 1}, the entries of "
            "the head. Take the model's own tokenizer, or resize the model's embeddings to this one",
            row=place[0] if len(place) > 1 else None,
        )


def _torch(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, weights: Tensor | None, options: HeadOptions
) -> tuple[Tensor, Tensor]:
    hidden, bias = _scaled(hidden, bias, options)
    nats = torch.nn.functional.linear_cross_entropy(
        *(hidden, weight, targets),
        linear_bias=bias,
        reduction="none",  # the sum alone would not tell the nats of each token
        options=torch.nn.LinearCrossEntropyOptions(),  # without them, all logits are made
    )
    return _weighted(nats, weights), nats.detach()


def _torch_lacks(device: torch.device, options: HeadOptions) -> str | None:
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return f"torch {torch.__version__} does not have it"
    if options.label_smoothing or options.z_loss or options.softcap is not None:
        return "has no label smoothing, z-loss or soft-capping in chunks"
    return None if options.dtype == sums_dtype(options.dtype) else f"gives nats in {options.dtype}"


def _liger(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, weights: Tensor | None, options: HeadOptions
) -> tuple[Tensor, Tensor]:
    hidden, bias = _scaled(hidden, bias, options)
    nats = import_module("liger_kernel.transformers.functional").liger_fused_linear_cross_entropy(
        *(hidden, weight, targets),
        bias=bias,
        reduction="none",
        softcap=options.softcap,
        accum_dtype=torch.float32,
    )
    return _weighted(nats, weights), nats.detach()


def _liger_lacks(device: torch.device, options: HeadOptions) -> str | None:
    if reason := _kernels_lack("liger_kernel", "liger-kernel", device):
        return reason
    if options.label_smoothing or options.z_loss:
        return "does not give nats beside a loss with label smoothing or z-loss"
    forward = import_module("liger_kernel.ops.fused_linear_cross_entropy").fused_linear_cross_entropy_forward
    if "token_grad_output" not in inspect.signature(forward).parameters:
        return "this release gives wrong gradients for losses of single tokens (Liger-Kernel #1298)"
    return None


def _cut(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, weights: Tensor | None, options: HeadOptions
) -> tuple[Tensor, Tensor]:
    hidden, bias = _scaled(hidden, bias, options)
    nats, log_z = import_module("cut_cross_entropy").linear_cross_entropy(
        *(hidden, weight, targets),
        bias=bias,
        softcap=options.softcap,
        reduction="none",
        return_lse=True,
        impl="cce_exact",  # the default leaves small gradients out
    )
    losses = nats + options.z_loss * log_z.square() if options.z_loss else nats
    return _weighted(losses, weights), nats.detach().float()


def _cut_lacks(device: torch.device, options: HeadOptions) -> str | None:
    if reason := _kernels_lack("cut_cross_entropy", "cut-cross-entropy", device):
        return reason
    if options.label_smoothing:
        return "has no label smoothing"
    return (
        None
        if options.dtype in (torch.float16, torch.bfloat16)
        else "sums gradients of half precision alone in float32"
    )


def _kernels_lack(module: str, package: str, device: torch.device) -> str | None:
    if find_spec(module) is None:
        return f"is not installed (pip install {package})"
    return None if device.type == "cuda" else f"does not run on {device.type}"


def _scaled(hidden: Tensor, bias: Tensor | None, options: HeadOptions) -> tuple[Tensor, Tensor | None]:
    """Hidden states and bias whose logits come out scaled."""
    if options.scale == 1:
        return hidden, bias
    return hidden * options.scale, None if bias is None else bias * options.scale


def _weighted(losses: Tensor, weights: Tensor | None) -> Tensor:
    losses = losses.to(sums_dtype(losses.dtype))
    return losses.sum() if weights is None else (losses * weights.to(losses.dtype)).sum()


#: By name. "chunked" is ours, in plain torch.
IMPLEMENTATIONS: dict[str, Implementation] = {
    "chunked": Implementation(chunked, lambda device, options: None),
    "torch": Implementation(_torch, _torch_lacks),
    "liger": Implementation(_liger, _liger_lacks),
    "cut_cross_entropy": Implementation(_cut, _cut_lacks),
}


def _chosen(name: str | None, device: torch.device, options: HeadOptions) -> Implementation:
    if name is None:
        return IMPLEMENTATIONS["chunked"]
    check_one_of("implementation", name, IMPLEMENTATIONS)
    if reason := IMPLEMENTATIONS[name].lacks(device, options):
        able = [other for other, one in IMPLEMENTATIONS.items() if one.lacks(device, options) is None]
        raise ConfigError(f"implementation {name!r} {reason}; expected one of {', '.join(able)}")
    return IMPLEMENTATIONS[name]
