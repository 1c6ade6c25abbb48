"""Logits and losses of chosen positions: the model's head runs only where a token is predicted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from hf_objectives.errors import ConfigError
from hf_objectives.evaluation.head import After, after_head, given_to_head, head_of, linear_parts, unwrapped, warn_once
from hf_objectives.losses import (
    SHIFTED,
    LossSum,
    TokenScores,
    check_targets,
    fused_linear_cross_entropy,
    next_token_loss,
    scores_of_logits,
    token_log_probs,
)
from hf_objectives.types import IGNORE_INDEX

T = TypeVar("T")
EXTRA_COLUMNS = ("labels", "loss_weights", "source_names", "source_ids", "row_ids", *SHIFTED)


def split_extra_columns(batch: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split a batch into the model's inputs and the extra columns for loss and evaluation."""
    inputs = {key: value for key, value in batch.items() if key not in EXTRA_COLUMNS}
    return inputs, {key: batch[key] for key in EXTRA_COLUMNS if key in batch}


def next_token_outputs(
    model: nn.Module,
    inputs: Mapping[str, Any],
    targets: Tensor,
    *,
    weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    full: bool = False,
    implementation: str | None = None,
    places: Tensor | None = None,
) -> tuple[LossSum, Any]:
    """Run a causal language model and compute its loss, head and loss in one, so that no logits are kept.

    That is proven on the live model first, see `after_head`. Where it does not hold, the logits of predicted tokens are
    computed, with a warning.

    The number of targets is read from the device unless `places` are given. With a gradient and on an accelerator nothing
    else is: a target outside the head's entries makes the loss NaN there.

    Args:
        model: the model, with or without a wrapper for data parallelism.
        inputs: the model's inputs, without labels.
        targets: int64 [batch, length] from `next_token_targets`; -100 where nothing is predicted.
        weights: float [targets], the weight of each target's loss, row by row; None for 1.
        label_smoothing, z_loss: see `next_token_loss`.
        full: see `selected_logits`.
        implementation: see `fused_linear_cross_entropy`.
        places: int64 [targets], see `predicting_places`.

    Returns:
        The sums over targets, and what else the model returned: the auxiliary loss of a mixture of experts, say.

    Raises:
        DataError: a target outside the head's entries; names its row of the batch and its place there.
    """
    places = predicting_places(targets) if places is None else places
    predicted = targets.flatten()[places]
    after = None if full else after_head(model)
    options: dict[str, Any] = {"weights": weights, "label_smoothing": label_smoothing, "z_loss": z_loss}
    fused: dict[str, Any] = {"implementation": implementation, **options, **(after._asdict() if after else {})}
    losses: list[LossSum] = []

    def take(head: nn.Module, chosen: Tensor) -> bool:
        parts = None if after is None else linear_parts(head, chosen)
        if parts is not None:
            losses.append(_head_loss(*parts, targets, predicted, fused))
        return parts is not None

    logits, output = _outputs(model, inputs, targets.shape, places, full=full, take=take)
    if not losses:
        check_targets(targets, logits.shape[-1])
        return next_token_loss(logits, predicted, **options), output
    if _is_sharded(model):
        # A backward pass through the model's own output, here of no token, is what gathers sharded weights for it.
        losses[0] = losses[0]._replace(loss=losses[0].loss + logits.sum().to(losses[0].loss.dtype))
    return losses[0], output


def token_score_outputs(
    model: nn.Module,
    inputs: Mapping[str, Any],
    shape: torch.Size,
    places: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    figures: Sequence[str] = (),
    run: Callable[..., Any] | None = None,
) -> tuple[TokenScores, Any]:
    """Run a causal language model and score single tokens, head and log-probabilities in one where that is proven.

    Args:
        model: the model, with or without a wrapper for data parallelism.
        inputs: the model's inputs, without labels.
        shape: [rows, length] of the inputs.
        places: int64 [targets], the places in the rows laid end to end that predict; one may predict several targets.
        targets: int64 [targets], what they predict.
        temperature, figures: see `token_log_probs`.
        run: is called in place of the model: a forward pass within that of a wrapper.

    Returns:
        The scores of the targets, and what else the model returned.
    """
    after = after_head(model)
    options: dict[str, Any] = {"temperature": temperature, "figures": figures}
    scores: list[TokenScores] = []
    is_apart = False

    def take(head: nn.Module, chosen: Tensor) -> bool:
        nonlocal is_apart
        is_apart = isinstance(head, FSDPModule) or any(hasattr(weight, "ds_id") for weight in head.parameters())
        parts = None if after is None else linear_parts(head, chosen)
        if parts is not None and after is not None:
            states, weight, bias = parts
            own = targets.to(states.device)  # a model may lie on several devices
            scores.append(token_log_probs(states, weight, own, bias=bias, **after._asdict(), **options))
        return parts is not None

    logits, output = _outputs(model, inputs, shape, places, take=take, run=run)
    if not scores:
        return scores_of_logits(logits, targets.to(logits.device), **options), output
    if is_apart:  # see `next_token_outputs`: this is what gathers its weight for the backward pass
        scores[0] = scores[0]._replace(log_probs=scores[0].log_probs + logits.sum().to(scores[0].log_probs.dtype))
    return scores[0], output


class HeadInputs(NamedTuple):
    """What the head of a model makes logits from: `cap(scale * (states @ weight.T + bias))`.

    Attributes:
        states: [places, width], what the head is given.
        weight, bias: [vocabulary, width] and [vocabulary] or None, the head's.
        after: what the model does after its head.
    """

    states: Tensor
    weight: Tensor
    bias: Tensor | None
    after: After


def at_head(
    model: nn.Module,
    inputs: Mapping[str, Any],
    shape: torch.Size,
    places: Tensor,
    compute: Callable[[HeadInputs], T],
) -> tuple[T, Tensor]:
    """Run a causal language model, and compute something in place of its logits, where its head's weight is whole.

    Args:
        model: the model, with or without a wrapper for data parallelism.
        inputs: the model's inputs, without labels.
        shape: [rows, length] of the inputs.
        places: int64 [places], see `predicting_places`.
        compute: is given what the head would be given at the places, with gradient.

    Returns:
        What `compute` returned, and a 0 with the gradient of the model's own output, of no token. It belongs into a loss: a
        backward pass through it is what gathers sharded weights.

    Raises:
        ConfigError: a model whose head is no plain linear layer, or that does something unknown after it.
    """
    after = after_head(model)
    found: list[T] = []

    def take(head: nn.Module, chosen: Tensor) -> bool:
        parts = None if after is None else linear_parts(head, chosen)
        if parts is not None and after is not None:
            found.append(compute(HeadInputs(*parts, after)))
        return parts is not None

    logits, _ = _outputs(model, inputs, shape, places, take=take)
    if not found:
        raise ConfigError(
            f"{type(unwrapped(model)).__name__} makes its logits in a way that is not known; expected a model with a linear "
            "head on one device, whose config says how logits are scaled or capped"
        )
    return found[0], logits.sum()


def _head_loss(
    states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    predicted: Tensor,
    options: Mapping[str, Any],
) -> LossSum:
    """The loss of hidden states, one for each of the targets that are `predicted`."""
    if not torch.is_grad_enabled() or targets.device.type == "cpu":
        check_targets(targets, len(weight))
    return fused_linear_cross_entropy(states, weight, predicted, bias=bias, trusted=True, **options)


def predicting_places(targets: Tensor) -> Tensor:
    """Where something is predicted: the places of targets other than -100 in `targets.flatten()`, int64 [targets]."""
    return (targets.flatten() != IGNORE_INDEX).nonzero().squeeze(1)


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
    return _outputs(model, inputs, positions.shape, positions.flatten().nonzero().squeeze(1), full=full)[0]


def target_nll(
    model: nn.Module,
    inputs: Mapping[str, Any],
    targets: Tensor,
    *,
    full: bool = False,
    implementation: str | None = None,
) -> Tensor:
    """Run a model and compute the negative log-likelihood of each target, without gradient.

    Args:
        model, inputs, targets, full, implementation: see `next_token_outputs`.

    Returns:
        float64 [targets], in nats, row by row.
    """
    with torch.no_grad():
        result, _ = next_token_outputs(model, inputs, targets, full=full, implementation=implementation)
    return result.token_nll.double()


def _outputs(
    model: nn.Module,
    inputs: Mapping[str, Any],
    shape: torch.Size,
    places: Tensor,
    *,
    full: bool = False,
    take: Callable[[nn.Module, Tensor], bool] = lambda head, chosen: False,
    run: Callable[..., Any] | None = None,
) -> tuple[Tensor, Any]:
    """Logits of `places` in rows of `shape` [batch, length], and all that the model returned.

    `take` is called where the head runs, with the head and the hidden states of `places`; if it returns True, no logits are
    made. `run` is called in place of the model.
    """
    run = model if run is None else run
    inputs = {**inputs, "use_cache": False}  # with a cache, transformers treats packed rows as one document
    head, virtual = None if full else head_of(model), virtual_tokens(model)
    if full:
        warn_once("torch.compile is on; computing full logits")
    if head is None:
        output = run(**inputs)
        return _at(places, shape, output.logits, virtual), output
    selected = False

    def select(hidden: Tensor) -> Tensor:
        nonlocal selected
        rows, width = shape
        if tuple(hidden.shape[:2]) not in ((rows, width), (rows, width + virtual)):
            return hidden
        selected = True
        chosen = _at(places, shape, hidden, virtual)
        return chosen[: 0 if take(head, chosen) else len(chosen)].unsqueeze(0)

    with given_to_head(head, select):
        output = run(**inputs)
    if selected:
        return output.logits[0], output
    warn_once("the model does not pass all hidden states through its output embeddings; computing full logits")
    return _at(places, shape, output.logits, virtual), output


def _at(places: Tensor, shape: torch.Size, values: Tensor, virtual: int) -> Tensor:
    """Values [batch, length, size] at places. Prompt tuning puts its tokens before those of the row."""
    is_longer = virtual and values.shape[1] == shape[1] + virtual
    return (values[:, virtual:] if is_longer else values).flatten(0, 1)[places.to(values.device)]


def _is_sharded(model: nn.Module) -> bool:
    """Whether no rank holds all weights: FSDP, DeepSpeed."""
    if isinstance(model, DistributedDataParallel):
        return False
    return unwrapped(model) is not model or any(isinstance(weight, DTensor) for weight in model.parameters())
