"""Every contact with private parts of transformers' Trainer and of accelerate; `hf_checkpoints.py` has those of checkpoints.

`tests/trainers/test_hf_compat.py` holds these contacts against the installed releases.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from accelerate.hooks import add_hook_to_module
from torch import Tensor, nn
from transformers.generation import GenerationMode

from hf_objectives.errors import ConfigError
from hf_objectives.evaluation import unwrapped
from hf_objectives.trainers.hf_checkpoints import WholeCheckpoints
from hf_objectives.trainers.refusals import refuse_cut_rows

#: Packages that put wrappers around `forward` of a model.
_WRAPPERS = ("accelerate", "hf_objectives", "torch", "trl")


class StepWatch:
    """What `watch_steps` calls during the steps of a Trainer; subclasses override what they need."""

    def step_begins(self) -> None:
        """Before the first micro-batch of a step."""

    def step_ends(self, batches: list[tuple[Mapping[str, Any], Tensor]], grad_norm: Any) -> None:
        """After the gradient is complete and clipped, before `on_pre_optimizer_step` and the optimizer's step.

        Args:
            batches: the inputs and the loss of each micro-batch.
            grad_norm: the norm of the gradient before clipping.
        """

    def step_fails(self) -> None:
        """After an error inside the step, one of another watch included."""


class _Steps:
    """The watched steps of one Trainer: it stands in the place of two of its methods."""

    def __init__(self, trainer: Any) -> None:
        self.watches: list[StepWatch] = []
        self._batches: list[tuple[Mapping[str, Any], Tensor]] = []
        self._trainer = trainer
        self._usual = {name: getattr(trainer, name) for name in ("training_step", "_get_grad_norm")}
        self._own = {name: vars(trainer)[name] for name in self._usual if name in vars(trainer)}
        trainer.training_step, trainer._get_grad_norm = self._training_step, self._get_grad_norm

    def restore(self) -> None:
        """Give the Trainer its methods back."""
        for name in (*self._usual, "_watched_steps"):
            vars(self._trainer).pop(name, None)
        vars(self._trainer).update(self._own)

    def _training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        if not self._batches:
            self._tell(lambda watch: watch.step_begins())
        loss = self._guarded(lambda: self._usual["training_step"](model, inputs, *args, **kwargs))
        self._batches.append((inputs if isinstance(inputs, Mapping) else {}, loss))
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = self._guarded(lambda: self._usual["_get_grad_norm"](model, grad_norm))
        batches, self._batches = self._batches, []
        self._tell(lambda watch: watch.step_ends(batches, norm))
        return norm

    def _tell(self, call: Callable[[StepWatch], None]) -> None:
        for watch in [*self.watches]:
            self._guarded(lambda watch=watch: call(watch))  # type: ignore[misc]

    def _guarded(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except BaseException:
            self._batches = []
            for watch in [*self.watches]:
                watch.step_fails()
            raise


def free_of_trainers(*models: Any) -> None:
    """Take off what trainers before have put around `forward` of models: TRL's fused head, ours, accelerate's autocast.

    TRL's runs the weights of the model that it was made for, in a copy of that model too.
    """
    for model in map(unwrapped, models):
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        given: Any = getattr(vars(inner).get("forward"), "__func__", None) if isinstance(inner, nn.Module) else None
        found, own = given, type(inner).forward if given else None
        while found is not own and (inside := _inside(found)) is not None:
            found = inside
        if found is given:
            continue
        del inner.forward
        if hook := vars(inner).get("_hf_hook"):  # of a model that lies on several devices
            del inner._old_forward
            add_hook_to_module(inner, hook)
        elif found is not own:
            inner.forward = types.MethodType(found, inner)


def let_copies_run(model: Any) -> None:
    """Let a copy of a model with TRL's fused head run its own weights; TRL's forward runs those that it was made for."""
    usual, own = model.forward, type(model).forward

    @functools.wraps(own)  # `generate` reads the signature
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if fused_lm_head or self is model:  # the fused head runs the layers of `self`
            return usual.__func__(self, *args, fused_lm_head=fused_lm_head, **kwargs)
        return own(self, *args, **kwargs)

    model.forward = types.MethodType(forward, model)


@contextmanager
def processing_last(model: Any, processor: Any) -> Iterator[None]:
    """Within it `generate` of a model gives scores to a `LogitsProcessor` after all others, where it samples single tokens.

    One that is passed to `generate` stands before temperature, top-k and their like.
    """
    usual = model._get_logits_processor

    def processors(generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        found = usual(generation_config, *args, **kwargs)
        if generation_config.get_generation_mode() == GenerationMode.SAMPLE:
            found.append(processor)
        return found

    model._get_logits_processor = processors
    try:
        yield
    finally:
        del model._get_logits_processor


@contextmanager
def positions_behind_padding(model: nn.Module) -> Iterator[None]:
    """Within it the positions of a row begin at its first token, as `generate` has them; `forward` counts padding too."""

    def add(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        mask = kwargs.get("attention_mask")
        if mask is None or kwargs.get("position_ids") is not None:
            return args, kwargs
        return args, {**kwargs, "position_ids": (mask.long().cumsum(dim=1) - 1).clamp_(min=0)}

    takes = "position_ids" in inspect.signature(type(model).forward).parameters
    handle = model.register_forward_pre_hook(add, with_kwargs=True) if takes else None
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


def _inside(function: Any) -> Any:
    """The function that a trainer's wrapper of `forward` calls; None for a function of another make."""
    made_in = getattr(function, "__globals__", {}).get("__name__") or type(function).__module__
    if made_in.partition(".")[0] not in _WRAPPERS:
        return None
    called = inspect.getclosurevars(function).nonlocals if inspect.isfunction(function) else {}
    inside = called.get("original_forward") or called.get("usual") or getattr(function, "__wrapped__", None)
    return getattr(inside, "__func__", inside)


def watch_steps(trainer: Any, watch: StepWatch) -> Callable[[], None]:
    """Watch the steps of any Trainer: callbacks are told neither batch nor loss.

    The watch that was added last is told first. So a monitor sees a step before the trainer's own check stops the run.

    Returns:
        A function that ends the watch. After the last one the Trainer has its own methods again.
    """
    steps: _Steps | None = getattr(trainer, "_watched_steps", None)
    if steps is None:
        steps = trainer._watched_steps = _Steps(trainer)
    steps.watches.insert(0, watch)

    def end() -> None:
        if watch in steps.watches:
            steps.watches.remove(watch)
            if not steps.watches:
                steps.restore()

    return end


class TrainerHooks(WholeCheckpoints):
    """Public hooks in the place of a Trainer's private methods; a mixin that stands before the Trainer.

    A subclass that defines one of `hooks` overrides the private method as well. For example, with
    `hooks = {"answers_loss": "_compute_loss"}` the Trainer calls `answers_loss` where it would call `_compute_loss`.
    """

    _signature_columns: Any
    #: Private methods, by the public names under which subclasses override them.
    hooks: ClassVar[dict[str, str]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for public, private in cls.hooks.items():
            if public in vars(cls):
                setattr(cls, private, vars(cls)[public])
            else:
                setattr(cls, public, getattr(cls, private))

    #: Columns of the rows that reach the collator, beside those that the model takes.
    extra_columns: tuple[str, ...] = ()

    #: Whether the trainer takes parts of rows from context parallelism; it has `rows_to_cut` then.
    takes_parts: ClassVar[bool] = False

    def create_accelerator_and_postprocess(self) -> None:
        """As the parent, for parallelism that the trainer takes; see `refuse_cut_rows`."""
        trainer: Any = self
        refuse_cut_rows(trainer.args.parallelism_config, takes_parts=self.takes_parts)
        super().create_accelerator_and_postprocess()  # type: ignore[misc]
        # accelerate launch may set it
        refuse_cut_rows(getattr(trainer.accelerator, "parallelism_config", None), takes_parts=self.takes_parts)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        # An evaluation before training marks a whole model as prepared, and accelerate would leave it without DDP then: each
        # process would train on its own rows alone. Wrappers and shards carry marks of their own, which stay.
        trainer: Any = self
        if not trainer.is_fsdp_enabled and not trainer.is_deepspeed_enabled:
            vars(trainer.model).pop("_is_accelerate_prepared", None)
        return super()._prepare_for_training(*args, **kwargs)  # type: ignore[misc]

    def rows_to_cut(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Prepare the rows of a batch for context parallelism.

        Returns:
            A copy, whose tensors are cut in place. All of shape [batch, length] are cut along the length.
        """
        raise NotImplementedError

    def count_targets(self, batches: Sequence[Mapping[str, Any]]) -> float | None:
        """Count what the loss of a step is divided by, over its micro-batches and all ranks; None: the Trainer counts."""
        return None

    def _prepare_context_parallel_inputs(self, model: Any, inputs: Any) -> tuple[Callable, Any]:
        trainer: Any = self
        if trainer.get_cp_size() == 1:
            return super()._prepare_context_parallel_inputs(model, inputs)  # type: ignore[misc]
        rows = self.rows_to_cut(inputs)
        context, rows = super()._prepare_context_parallel_inputs(model, rows)  # type: ignore[misc]
        options: Any = context.keywords
        # The Trainer cuts the columns that it knows. The others must be cut alike: a part is a piece from each end of a row.
        known = {id(tensor) for tensor in options["buffers"]}
        shape = rows["input_ids"].shape
        ours = [
            tensor for tensor in rows.values() if getattr(tensor, "shape", None) == shape and id(tensor) not in known
        ]
        options["buffers"] += ours
        options["buffer_seq_dims"] += [1] * len(ours)
        options["no_restore_buffers"] |= {*ours}
        return context, rows

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()  # type: ignore[misc]
        self._signature_columns = list(dict.fromkeys([*(self._signature_columns or []), *self.extra_columns]))

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | int | None:
        count = self.count_targets(batch_samples)
        if count is None:
            return super()._get_num_items_in_batch(batch_samples, device)  # type: ignore[misc]
        return torch.tensor(count, device=device)


def count_shifted_labels(trainer: Any) -> None:
    """Let a Trainer count `num_items_in_batch` over shifted labels, whatever the signature of the model."""
    trainer.model_accepts_loss_kwargs = True
    trainer._loss_shifts_labels = True


def copies_of_rows() -> int:
    """Number of processes that a loader of accelerate gives the same rows: those of tensor and of context parallelism."""
    from accelerate.state import AcceleratorState, is_initialized  # a second, which programs without a model are spared

    parallelism = AcceleratorState().parallelism_config if is_initialized() else None
    return 1 if parallelism is None else parallelism.tp_size * parallelism.cp_size


def is_stateful(model: nn.Module) -> bool:
    """Whether a model, or one inside it, carries a state along a row, as Mamba does."""
    return any(getattr(module, "_is_stateful", False) for module in model.modules())


def train_batch_size(trainer: Any) -> int:
    """Rows of a training batch on one process, after `auto_find_batch_size`."""
    return trainer._train_batch_size


def prepared_batch(trainer: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch on the device of the run."""
    return trainer._prepare_input(dict(batch))


def prepare_sharded(trainer: Any) -> nn.Module:
    """The wrapped model of a sharded run (FSDP, DeepSpeed); before training it is wrapped here."""
    if len(trainer.accelerator._models) == 0:
        if trainer.accelerator.is_fsdp2:  # accelerate wraps a model for FSDP2 with its optimizer alone
            trainer.create_optimizer()
            wrapped, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
        else:
            wrapped = trainer.accelerator.prepare(trainer.model)
        trainer.model_wrapped = wrapped
        if trainer.is_fsdp_enabled:
            trainer.model = trainer.model_wrapped
    return trainer.model_wrapped


def reshard(model: nn.Module) -> None:
    """Give up the weights of other ranks that a forward pass under FSDP2 left: accelerate takes shards to train."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def router_loss(model: Any, output: Any) -> tuple[Tensor, float] | None:
    """The auxiliary loss that a mixture of experts adds to its own loss, and its weight there.

    Args:
        model: the model without wrappers for data parallelism; a PeftModel may be.
        output: what it returned for inputs without labels.

    Returns:
        None for a model that computes none: without experts, or with `output_router_logits` off in its config.

    Raises:
        ConfigError: the model's weight for it is not found, so that its loss cannot be told.
    """
    aux = getattr(output, "aux_loss", None)
    if aux is None:
        return None
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    # The forward of most models reads the attribute that the constructor took from the config; a few read the config.
    for holder in (model, config):
        for name in ("router_aux_loss_coef", "aux_loss_coef"):
            if isinstance(aux, Tensor) and (weight := getattr(holder, name, None)) is not None:
                return aux, float(weight)
    found = "without a known weight" if isinstance(aux, Tensor) else repr(aux)
    raise ConfigError(
        f"{type(model).__name__} returns an auxiliary loss {found}; expected a tensor, and "
        "router_aux_loss_coef in the config. Set output_router_logits=False in the config to train without it"
    )


def attention_of(model: Any) -> str | None:
    """The name of a model's attention implementation."""
    return getattr(getattr(model, "config", None), "_attn_implementation", None)


def origin_of(model: Any) -> str | None:
    """The folder or Hub id that a model was loaded from; empty for a model that was built."""
    return getattr(getattr(model, "config", None), "_name_or_path", None)


def stop_ids(holder: Any) -> list[int]:
    """The EOS ids of a generation config or a tokenizer, which names none, one or several."""
    ids = getattr(holder, "eos_token_id", None)
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
