"""Heads with hidden states and targets, and their loss by autograd through all logits in float64."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_objectives.losses import fused_linear_cross_entropy

CHUNK = 97 * 8 * 7  # bytes of seven tokens in float64, of fourteen in float32


def example(tokens=50, width=16, entries=97, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(entries, width, generator=generator, dtype=torch.float64)
    bias = torch.randn(entries, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, entries, (tokens,), generator=generator)
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype), targets


def by_autograd(hidden, weight, bias, targets, *, weights=None, smoothing=0.0, z=0.0, softcap=None, scale=1.0):
    """Loss, nats of each target, and gradients, by autograd through all logits in float64."""
    parts = [None if part is None else part.detach().double().requires_grad_() for part in (hidden, weight, bias)]
    logits = torch.nn.functional.linear(*parts) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
    losses = losses + z * torch.logsumexp(logits, dim=-1) ** 2 * (targets != -100)
    loss = (losses if weights is None else losses * weights.double()).sum()
    loss.backward()
    nats = torch.nn.functional.cross_entropy(logits, targets, reduction="none").detach()
    return loss.item(), nats, [None if part is None else part.grad for part in parts]


def ours(hidden, weight, bias, targets, **options):
    parts = [None if part is None else part.detach().requires_grad_() for part in (hidden, weight, bias)]
    result = fused_linear_cross_entropy(parts[0], parts[1], targets, bias=parts[2], chunk_bytes=CHUNK, **options)
    result.loss.backward()
    return result, [None if part is None else part.grad for part in parts]


def close(found, expected, share):
    for one, other in zip(found, expected, strict=True):
        if other is not None:
            largest = float(other.abs().max()) if other.numel() else 0.0
            assert torch.allclose(one.double(), other, atol=share * largest, rtol=0)


class LargestTensor(TorchDispatchMode):
    """Within it: `bytes` of the largest tensor that any operation returns."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for part in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(part, torch.Tensor):
                self.bytes = max(self.bytes, part.untyped_storage().nbytes())
        return result
