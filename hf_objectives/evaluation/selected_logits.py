"""Logits of chosen positions only: the head of a language model is run where a token is supervised, nowhere else."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

logger = logging.getLogger(__name__)
_told: set[str] = set()


def selected_logits(model: nn.Module, inputs: Mapping[str, Any], positions: Tensor, *, full: bool = False) -> Tensor:
    """Run a causal language model, and its head at `positions` alone.

    A hook hands the head the hidden states of these positions only. What a model does to its logits after the head
    (Gemma's soft-capping, Cohere's and Granite's scaling) it still does, since that acts on each logit by itself.

    Args:
        model: the model, wrapped for data parallelism or not.
        inputs: what the model takes, without labels.
        positions: bool [batch, length], the positions whose logits are wanted.
        full: let the head see every position (`torch.compile`, to which a hook is a break) and select afterwards.

    Returns:
        Logits [positions, vocabulary] in the model's dtype, row by row. Full logits, which is said once, where the head
        cannot be reached.
    """
    inputs = {**inputs, "use_cache": False}  # with a cache, transformers takes packed rows for one document
    head = None if full else _head(model)
    if full:
        _tell("torch.compile is on; computing full logits")
    if head is None:
        return model(**inputs).logits[positions]
    selected = False

    def select(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        nonlocal selected
        hidden = args[0] if args else next(iter(kwargs.values()))
        if hidden.shape[:2] != positions.shape:
            return None
        selected = True
        chosen = hidden[positions].unsqueeze(0)
        return ((chosen, *args[1:]), kwargs) if args else (args, {next(iter(kwargs)): chosen})

    handle = head.register_forward_pre_hook(select, with_kwargs=True)
    try:
        logits = model(**inputs).logits
    finally:
        handle.remove()
    if selected:
        return logits[0]
    _tell("the model does not pass all hidden states through its output embeddings; computing full logits")
    return logits[positions]


def _head(model: nn.Module) -> nn.Module | None:
    inner = model
    while hasattr(inner, "module") and isinstance(inner.module, nn.Module):  # DDP, DeepSpeed
        inner = inner.module
    find = getattr(inner, "get_output_embeddings", None)
    head = find() if callable(find) else None
    if head is None:
        _tell(f"{type(inner).__name__} has no output embeddings to narrow; computing full logits")
    return head


def _tell(line: str) -> None:
    if line not in _told:
        _told.add(line)
        logger.warning(line)
