"""Logits and losses of chosen positions: the model's head runs only where a token is predicted."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from hf_objectives.losses import SHIFTED, token_nll
from hf_objectives.types import IGNORE_INDEX

logger = logging.getLogger(__name__)
_CHUNK = 1024  # tokens whose logits are in float32 at a time
EXTRA_COLUMNS = ("labels", "loss_weights", "source_names", "source_ids", "row_ids", *SHIFTED)


def split_extra_columns(batch: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split a batch into the model's inputs and the extra columns for loss and evaluation."""
    inputs = {key: value for key, value in batch.items() if key not in EXTRA_COLUMNS}
    return inputs, {key: batch[key] for key in EXTRA_COLUMNS if key in batch}


def unwrapped(model: Any) -> Any:
    """The model inside wrappers for data parallelism (DDP, FSDP1, DeepSpeed)."""
    while isinstance(getattr(model, "module", None), nn.Module):
        model = model.module
    return model


def virtual_tokens(model: Any) -> int:
    """Tokens that a model of PEFT learns beside the row (prompt and prefix tuning); 0 for other models."""
    config: Any = getattr(unwrapped(model), "active_peft_config", None)
    return int(config.num_virtual_tokens) if getattr(config, "is_prompt_learning", False) else 0


def selected_logits(model: nn.Module, inputs: Mapping[str, Any], positions: Tensor, *, full: bool = False) -> Tensor:
    """Run a causal language model, and its head at `positions` only.

    A hook gives the head the hidden states of these positions. What the model does to logits after the head (Gemma's
    soft-capping, the scaling of Cohere and Granite) still happens, because it acts on each logit by itself.

    Args:
        model: the model, with or without a wrapper for data parallelism.
        inputs: the model's inputs, without labels.
        positions: bool [batch, length], the positions of the wanted logits.
        full: run the head at every position and select afterwards. `torch.compile` needs this: a hook breaks its graph.

    Returns:
        Logits [positions, vocabulary] in the model's dtype, row by row. Where the head cannot be found, all logits are
        computed and a warning says so once.
    """
    return selected_outputs(model, inputs, positions, full=full)[0]


def selected_outputs(
    model: nn.Module, inputs: Mapping[str, Any], positions: Tensor, *, full: bool = False
) -> tuple[Tensor, Any]:
    """As `selected_logits`, and what else the model returned: the auxiliary loss of a mixture of experts, say."""
    inputs = {**inputs, "use_cache": False}  # with a cache, transformers treats packed rows as one document
    head, virtual = None if full else _head(model), virtual_tokens(model)
    if full:
        _warn_once("torch.compile is on; computing full logits")
    if head is None:
        output = model(**inputs)
        return _at(positions, output.logits, virtual), output
    selected = False

    def select(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        nonlocal selected
        hidden = args[0] if args else next(iter(kwargs.values()))
        rows, width = positions.shape
        if tuple(hidden.shape[:2]) not in ((rows, width), (rows, width + virtual)):
            return None
        selected = True
        chosen = _at(positions, hidden, virtual).unsqueeze(0)
        return ((chosen, *args[1:]), kwargs) if args else (args, {next(iter(kwargs)): chosen})

    handle = head.register_forward_pre_hook(select, with_kwargs=True)
    try:
        output = model(**inputs)
    finally:
        handle.remove()
    if selected:
        return output.logits[0], output
    _warn_once("the model does not pass all hidden states through its output embeddings; computing full logits")
    return _at(positions, output.logits, virtual), output


def _at(positions: Tensor, values: Tensor, virtual: int) -> Tensor:
    """Values [batch, length, size] at positions [batch, length]. Prompt tuning puts its tokens before those of the row."""
    is_longer = values.shape[1] == positions.shape[1] + virtual
    return values[:, virtual:][positions] if is_longer else values[positions]


def target_nll(model: nn.Module, inputs: Mapping[str, Any], targets: Tensor, *, full: bool = False) -> Tensor:
    """Run a model and compute the negative log-likelihood of each target.

    Args:
        model, inputs, full: see `selected_logits`.
        targets: int64 [batch, length] from `next_token_targets`; -100 where nothing is predicted.

    Returns:
        float64 [targets], in nats, row by row.
    """
    positions = targets != IGNORE_INDEX
    logits = selected_logits(model, inputs, positions, full=full)
    parts = zip(logits.split(_CHUNK), targets[positions].split(_CHUNK), strict=True)
    return torch.cat([token_nll(part, chosen) for part, chosen in parts]).double()


def _head(model: nn.Module) -> nn.Module | None:
    inner = unwrapped(model)
    find = getattr(inner, "get_output_embeddings", None)
    head = find() if callable(find) else None
    if head is None:
        _warn_once(f"{type(inner).__name__} has no output embeddings; computing full logits")
    return head


@cache
def _warn_once(line: str) -> None:
    logger.warning(line)
