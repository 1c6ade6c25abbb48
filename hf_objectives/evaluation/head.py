"""Head and loss in one for a model: where its head is, what the model does after it, and the proof that both are right."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_objectives.losses import fused_linear_cross_entropy, token_nll

logger = logging.getLogger(__name__)
_TOKENS = 16  # of the proof
_LARGE = 20.0  # largest logit of the proof: soft-capping would not show in small ones
#: Settings of transformers' configs that multiply logits, or divide them: which of the two, the proof tells.
_SCALES = ("logit_scale", "logits_scaling", "output_multiplier", "lm_head_multiplier")


class After(NamedTuple):
    """What a model does after its head: logits times `scale`, and `softcap * tanh(logits / softcap)`."""

    softcap: float | None = None
    scale: float = 1.0


_PROVEN: WeakKeyDictionary[nn.Module, After | None] = WeakKeyDictionary()


def unwrapped(model: Any) -> Any:
    """The model inside wrappers for data parallelism (DDP, FSDP1, DeepSpeed)."""
    while isinstance(getattr(model, "module", None), nn.Module):
        model = model.module
    return model


def head_of(model: nn.Module) -> nn.Module | None:
    """The module that makes logits; None, with a warning, for a model that names none."""
    inner = unwrapped(model)
    find = getattr(inner, "get_output_embeddings", None)
    head = find() if callable(find) else None
    if head is None:
        warn_once(f"{type(inner).__name__} has no output embeddings; computing full logits")
    return head


def linear_parts(head: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """Hidden states, weight and bias whose linear product is what a head gives for `hidden` [tokens, width].

    A head under LoRA is one product over the hidden states and their low-rank part side by side, so that small changes
    survive the rounding of half precision. Call it where the head runs: elsewhere a sharded weight is not whole.

    Returns:
        None for a head that is no plain linear layer, or whose weight is not whole on the device of the hidden states.
    """
    layers: Any = head
    if hasattr(layers, "modules_to_save"):  # a head that is trained and saved whole beside an adapter
        whole = layers.modules_to_save[layers.active_adapters[0]] if layers.active_adapters else None
        return linear_parts(layers.original_module if whole is None or layers.disable_adapters else whole, hidden)
    if hasattr(layers, "lora_A") and hasattr(layers, "base_layer"):
        parts = linear_parts(layers.base_layer, hidden)
        if parts is None or layers.disable_adapters or layers.merged:
            return parts
        return _with_adapters(layers, hidden, *parts)
    if type(head).forward is not nn.Linear.forward or not isinstance(head, nn.Linear):
        return None
    if isinstance(head.weight, DTensor) or head.weight.device != hidden.device:
        return None
    return hidden, head.weight, head.bias


def _with_adapters(
    layers: Any, hidden: Tensor, same: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    states, weights = [same], [weight]
    for name in layers.active_adapters:
        if name not in layers.lora_A:
            continue
        down, up = layers.lora_A[name], layers.lora_B[name]
        # AdaLoRA has parameters and no layers there.
        if not isinstance(up, nn.Linear) or layers.lora_variant.get(name) is not None or up.bias is not None:
            return None
        low = down(layers.lora_dropout[name](hidden.to(down.weight.dtype))) * layers.scaling[name]
        states.append(low.to(hidden.dtype))
        weights.append(up.weight.to(weight.dtype))
    return torch.cat(states, dim=-1), torch.cat(weights, dim=-1), bias


def after_head(model: nn.Module) -> After | None:
    """What a model does after its head, proven once on the live model: loss from hidden states against its own logits.

    The forward pass of 16 tokens is the same on all ranks. Mode and random state stay as they were.

    Returns:
        None, with a warning, where no reading of the model's config gives the nats of its logits within rounding.
    """
    head = head_of(model)
    if head is None:
        return None
    if head not in _PROVEN:
        _PROVEN[head] = _prove(model, head)
    return _PROVEN[head]


@contextmanager
def given_to_head(head: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within it, the head is given `change(hidden)`. The hook runs where a sharded weight is whole."""

    def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        name = next(iter(kwargs))
        return args, {**kwargs, name: change(kwargs[name])}

    handle = head.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def _prove(model: nn.Module, head: nn.Module) -> After | None:
    inner, device = unwrapped(model), next(model.parameters()).device
    config: Any = getattr(inner, "config", None)  # a model of one's own may have none
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    weight: Any = head.weight
    entries = int(getattr(config, "vocab_size", None) or len(weight))
    ids = torch.randint(0, entries, (1, _TOKENS), generator=torch.Generator().manual_seed(0)).to(device)
    targets, nats, bound = ids[0].roll(-1), dict[After, Tensor](), 0.0

    def enlarge(hidden: Tensor) -> Tensor:
        nonlocal bound
        # Prompt tuning puts tokens of its own before those of the row.
        parts = linear_parts(head, hidden[0, -_TOKENS:]) if hidden.shape[1] >= _TOKENS else None
        if parts is None:
            return hidden
        is_half = torch.is_autocast_enabled(hidden.device.type) or hidden.dtype in (torch.bfloat16, torch.float16)
        bound = 2e-2 if is_half else 1e-5
        hidden = hidden * (_LARGE / (float(torch.nn.functional.linear(*parts).abs().max()) or 1.0))
        states, weight, bias = linear_parts(head, hidden[0, -_TOKENS:]) or parts
        for after in _candidates(config):
            nats[after] = fused_linear_cross_entropy(states, weight, targets, bias=bias, **after._asdict()).token_nll
        return hidden

    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with given_to_head(head, enlarge):
            logits = model(input_ids=ids, use_cache=False).logits[0, -_TOKENS:].float()
    except TypeError as error:  # its forward needs more than ids
        warn_once(
            f"{type(inner).__name__}: no proof from ids alone ({error}); computing the logits of predicted tokens"
        )
        return None
    finally:
        for module, is_training in modes.items():
            module.training = is_training
    own = token_nll(logits, targets)
    gaps = {after: float((found - own).abs().max()) for after, found in nats.items()}
    for after, gap in gaps.items():
        if gap <= bound * float(logits.abs().max()):
            return after
    why = f"differs from its own logits by {min(gaps.values()):.2g} nats" if gaps else "needs a plain linear head"
    warn_once(f"{type(inner).__name__}: head and loss in one {why}; computing the logits of predicted tokens")
    return None


def _candidates(config: Any) -> list[After]:
    """Readings of a config, the most particular ones first."""
    values = [float(value) for name in _SCALES if (value := getattr(config, name, None))]
    scales = [*values, *(1 / value for value in values), 1.0]
    caps = [cap for cap in (getattr(config, "final_logit_softcapping", None), None) if cap or cap is None]
    return list(dict.fromkeys(After(cap, scale) for cap in caps for scale in scales))


@cache
def warn_once(line: str) -> None:
    """Log a warning the first time that it is given."""
    logger.warning(line)
