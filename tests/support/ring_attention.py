"""Torch's ring attention on a CPU, whose kernels torch hands to its dispatcher for GPUs alone."""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.experimental._context_parallel import _attention

aten = torch.ops.aten
FORWARD = aten._scaled_dot_product_flash_attention_for_cpu.default
BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def _local(values):
    return [value.to_local() if isinstance(value, DTensor) else value for value in values]


def _wrapped(mesh, parts):
    return tuple(DTensor.from_local(part, mesh, [Shard(2)], run_check=False) for part in parts)


def _forward(call, args, kwargs):
    query, key, value, dropout, is_causal = [*_local(args), *(0.0, False)[len(args) - 3 :]]
    assert is_causal and not dropout and kwargs.get("attn_mask") is None
    out, lse = _attention._templated_ring_attention(
        args[0].device_mesh.get_group(), 2, call, query, key, value, is_causal=is_causal, scale=kwargs.get("scale")
    )
    return _wrapped(args[0].device_mesh, (out, lse))


def _backward(call, args, kwargs):
    grad, query, key, value, out, lse, dropout, is_causal = _local(args)
    parts = _attention._templated_ring_attention_backward(
        args[1].device_mesh.get_group(), 2, call, grad, "grad_out", query, key, value, out, lse, is_causal,
        dropout_p=dropout, scale=kwargs.get("scale"),
    )  # fmt: skip
    return _wrapped(args[1].device_mesh, parts)


def on_cpu() -> None:
    """Let `torch.distributed.tensor.experimental.context_parallel` run on a CPU, for the rest of the process."""
    _attention.custom_ops.update({FORWARD: _forward, BACKWARD: _backward})
