"""Every contact with private parts of TRL: hooks with public names, and the helpers of `trl.trainer.utils`.

`hooks` of a class below names the private methods that subclasses override under public names.
`tests/trainers/test_trl_compat.py` holds these contacts against the installed release.
"""

from __future__ import annotations

import functools
import textwrap
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import torch
from accelerate.utils import is_peft_model, send_to_device
from torch import Tensor, nn
from trl import DPOTrainer, RewardTrainer, RLOOTrainer
from trl.data_utils import get_dataset_column_names as get_dataset_column_names
from trl.models import enable_selective_activation_checkpointing as enable_selective_activation_checkpointing
from trl.models import get_act_offloading_ctx_manager as get_act_offloading_ctx_manager
from trl.models import prepare_deepspeed
from trl.models.utils import prepare_fsdp
from trl.trainer.dpo_trainer import DataCollatorForPreference as DPOCollator
from trl.trainer.reward_trainer import DataCollatorForPreference as RewardCollator
from trl.trainer.reward_trainer import suppress_seqcls_warning as suppress_seqcls_warning
from trl.trainer.utils import FusedCausalLMOutput, RepeatSampler, add_fused_lm_head
from trl.trainer.utils import disable_dropout_in_model as disable_dropout_in_model
from trl.trainer.utils import get_callable_name as get_callable_name
from trl.trainer.utils import is_async_callable as is_async_callable

from hf_objectives.errors import ConfigError
from hf_objectives.evaluation import after_head, token_score_outputs, unwrapped
from hf_objectives.trainers.hf_compat import (
    TrainerHooks,
    let_copies_run,
    positions_behind_padding,
    prepare_sharded,
    reshard,
)
from hf_objectives.types import IGNORE_INDEX

__all__ = ["DPOCollator", "DPOHooks", "PromptOrder", "RLOOHooks", "RewardCollator", "RewardHooks", "TRLHooks"]


def place_reference(model: Any, accelerator: Any, *, temperature: float = 1.0) -> Any:
    """Put a frozen reference on the run's device, sharded as the policy is, with TRL's fused head for log-probabilities."""
    add_fused_lm_head(model, temperature=temperature)
    if accelerator.distributed_type == "DEEPSPEED":
        return prepare_deepspeed(model, accelerator)
    if accelerator.distributed_type == "FSDP":
        return prepare_fsdp(model, accelerator)
    return accelerator.prepare_model(model, evaluation_mode=True)


def innermost(model: Any) -> Any:
    """The model of transformers inside PEFT and wrappers for data parallelism."""
    inner = unwrapped(model)
    return inner.get_base_model() if is_peft_model(inner) else inner


#: From the padded inputs of a forward pass to those of the model for packed rows, and the place of each padded token in the
#: rows laid end to end, int64 [batch, width]; None for the padded batch as it is.
Pack = Callable[[dict[str, Any]], tuple[dict[str, Any], Tensor] | None]


def score_tokens(
    model: Any,
    *,
    figures: Callable[[], Sequence[str]],
    temperature: float = 1.0,
    pack: Pack | None = None,
) -> None:
    """Let `token_log_probs` do what TRL's fused head does, over packed rows if wanted.

    Callers give and get what they do with TRL's: the padded batch with `labels` and `fused_lm_head=True`, and values of
    [batch, width - 1], 0 where no label is. Only tokens with a label pass through the head, on a CPU too.

    Args:
        model: a model with TRL's fused head, without wrappers.
        figures: what to compute beside log-probabilities, see `token_log_probs`; called at each pass.
        temperature: what logits are divided by.
        pack: see `Pack`.
    """
    let_copies_run(model)
    usual = model.forward

    @functools.wraps(type(model).forward)  # `generate` reads the signature
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, labels: Tensor | None = None, **kwargs: Any) -> Any:
        run = types.MethodType(usual.__func__, self)
        if not fused_lm_head or labels is None or args:
            return run(*args, fused_lm_head=fused_lm_head, labels=labels, **kwargs)
        packed, targets = None if pack is None else pack(kwargs), labels[:, 1:]
        wanted = targets != IGNORE_INDEX
        if packed is None:
            inputs, shape = kwargs, labels.shape
            places = torch.arange(labels.numel(), device=labels.device).view(shape)
        else:
            inputs, places = packed
            shape = inputs["input_ids"].shape
        scores, output = token_score_outputs(
            *(self, inputs, shape, places[:, :-1][wanted], targets[wanted]),
            temperature=temperature,
            figures=figures(),
            run=run,
        )
        spread = {
            name: value.new_zeros(wanted.shape).masked_scatter(wanted.to(value.device), value)
            for name, value in scores._asdict().items()
            if value is not None
        }
        loss, aux = -scores.log_probs.sum() / wanted.sum().clamp(min=1), getattr(output, "aux_loss", None)
        return FusedCausalLMOutput(loss=loss, label_mask=wanted, aux_loss=aux, **spread)

    model.forward = types.MethodType(forward, model)


class TRLHooks(TrainerHooks):
    """What the trainers of TRL have in common."""

    accelerator: Any
    args: Any
    data_collator: Any
    model: Any
    _metrics: Any
    _precompute_model_hash: Any
    _tokenizer: Any
    counters = ("_total_train_tokens",)  # logged as num_tokens

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate as the parent does. Its loader, and the sampling of answers, leave training's random state as it was."""
        device = self.args.device
        if self.accelerator.is_fsdp2:
            prepare_sharded(self)  # before training the parent would hand accelerate the model without its optimizer
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            output = super().evaluation_loop(*args, **kwargs)  # type: ignore[misc]
        reshard(self.model)
        return output

    @property
    def mode(self) -> str:
        """ "train" or "eval", by the mode of the model."""
        return "train" if self.model.training else "eval"

    @property
    def text_tokenizer(self) -> Any:
        """The tokenizer, also that of a multimodal processor."""
        return self._tokenizer

    def book(self, figures: Mapping[str, float], mode: str | None = None) -> None:
        """Add figures to the means that TRL writes with its next log."""
        for name, value in figures.items():
            self._metrics[mode or self.mode][name].append(value)

    def rename_booked(self, rename: Callable[[str], str]) -> None:
        """Rename the figures of TRL's next log."""
        booked = self._metrics[self.mode]
        for name in [*booked]:
            booked[rename(name)] = booked.pop(name)

    def replace_booked(self, figures: Mapping[str, float], mode: str | None = None) -> None:
        """Let TRL's next log have these figures, and not the means of what it has gathered under their names."""
        for name, value in figures.items():
            self._metrics[mode or self.mode][name] = [value]

    def add_figures(self, output: Any, figures: Mapping[str, float], prefix: str, replaced: Iterable[str]) -> None:
        """Put exact figures into the metrics of an evaluation, and those that are `replaced` into TRL's next log too."""
        output.metrics.update({f"{prefix}_{name}": value for name, value in figures.items()})
        self.replace_booked({name: figures[name] for name in replaced}, "eval")


class DPOHooks(TRLHooks, DPOTrainer):
    """`trl.DPOTrainer` with hooks."""

    hooks: ClassVar = {"prepare_dataset": "_prepare_dataset", "batch_loss": "_compute_loss"}

    def figures_of(self, model: nn.Module) -> tuple[str, ...]:
        """What TRL logs of a model, and weighs its loss by; see `token_log_probs`."""
        if model is self.ref_model:
            return ()
        return "entropy", "mean_logits", "is_top1", *["log_sum_sq_probs"] * bool(self.use_weighting)

    def reference_settings(self) -> str:
        """What the cache of reference log-probabilities depends on, beside rows and model."""
        return ""

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        settings, model_hash = self.reference_settings(), self._precompute_model_hash
        self._precompute_model_hash = f"{model_hash} {settings}"
        try:
            return super()._precompute_ref_logps(dataset, name, batch_size)
        finally:
            self._precompute_model_hash = model_hash

    def _set_signature_columns_if_needed(self) -> None:
        if self._is_vision_dataset:
            self.extra_columns = ()
        super()._set_signature_columns_if_needed()

    @contextmanager
    def watching_forwards(self) -> Iterator[dict[str, FusedCausalLMOutput]]:
        """Within it: what "policy" and "reference" gave of each token, [2n, length], as TRL's fused head does."""
        seen: dict[str, FusedCausalLMOutput] = {}
        passes: list[str] = []

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            if getattr(output, "log_probs", None) is not None:
                passes.append("reference" if is_reference(module, self) else "policy")
                seen[passes[-1]] = output

        models = [model for model in (self.model, self.ref_model) if model is not None]
        handles = [model.register_forward_hook(keep) for model in models]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()
        expected = ["policy"] if self.precompute_ref_logps else ["policy", "reference"]
        if sorted(passes) != expected:
            raise ConfigError(
                f"DPOTrainer ran forward passes of {', '.join(passes) or 'no model'} for a loss; expected "
                f"{', '.join(expected)}. This release of TRL computes the loss in another way than trl 1.16"
            )


class RewardHooks(TRLHooks, RewardTrainer):
    """`trl.RewardTrainer` with hooks."""

    hooks: ClassVar = {"prepare_dataset": "_prepare_dataset", "save_weights": "_save"}


class Forward(NamedTuple):
    """A forward pass over answers.

    Attributes:
        logps: float [batch, length], log-probability of each token.
        values: float [batch, length], what a critic that shares the backbone read on the way; None without one.
    """

    logps: Tensor
    values: Tensor | None


class RLOOHooks(TRLHooks, RLOOTrainer):
    """`trl.RLOOTrainer` with hooks, and the model card of PPO."""

    _tag_names: ClassVar = ["trl", "ppo"]
    _name = "PPO"
    _paper: ClassVar = {
        "title": "Proximal Policy Optimization Algorithms",
        "id": "1707.06347",
        "citation": textwrap.dedent("""\
            @article{schulman2017proximal,
                title  = {{Proximal Policy Optimization Algorithms}},
                author = {John Schulman and Filip Wolski and Prafulla Dhariwal and Alec Radford and Oleg Klimov},
                year   = 2017,
                eprint = {arXiv:1707.06347}
            }"""),
    }
    hooks: ClassVar = {
        "tokenize_prompts": "_tokenize_prompts",
        "calculate_rewards": "_calculate_rewards",
        "generate_and_score": "_generate_and_score_completions",
        "generate_answers": "_generate_single_turn",
        "answers_loss": "_compute_loss",
    }
    #: The last forward pass of the "policy" and of the "reference".
    forwards: dict[str, Forward]
    _buffered_inputs: Any
    scores_tokens = False
    _figures: tuple[str, ...] = ()

    def score_tokens(self) -> None:
        """From now on compute log-probabilities by `score_tokens`. Not under `torch.compile`, whose graph it would break."""
        if self.args.torch_compile:
            return
        self.scores_tokens = True
        for model in (self.model, self.ref_model):
            if model is not None:
                score_tokens(innermost(model), figures=lambda: self._figures, temperature=self.temperature)

    def answers_of_epoch(self, batches: list[dict[str, Any]], epoch: int) -> list[dict[str, Any]]:
        """Given the micro-batches of answers when an epoch over them begins; gives those that it is trained on."""
        return batches

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        epoch, place = divmod(self._step, self.args.steps_per_generation)
        if self.model.training and (place == 0 or self._buffered_inputs is not before):
            self._buffered_inputs = self.answers_of_epoch(self._buffered_inputs, epoch % self.num_iterations)
            inputs = self._buffered_inputs[place]
        return inputs

    def leaves_out(self) -> bool:
        """Whether the steps over this batch of answers are over before its epochs are."""
        return False

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Train as the parent does. A step that is left out has no forward pass and no gradient, and its loss is 0."""
        if self._step % (self.args.steps_per_generation * self.num_iterations) == 0 or not self.leaves_out():
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()  # an evaluation may stand before it
        self._step += 1
        return torch.zeros((), device=self.args.device)

    @contextmanager
    def reading_values(self, role: str, keep: int) -> Iterator[list[Tensor]]:
        """Around a forward pass: the values [batch, keep] that a critic reads on the way."""
        yield []

    def per_token(self, model: nn.Module, ids: Tensor, attention: Tensor, keep: int, **options: Any) -> Any:
        """Log-probabilities, entropies and auxiliary loss of the last `keep` tokens."""
        return self._get_per_token_logps_and_entropies(model, ids, attention, keep, **options)

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        role = "reference" if is_reference(model, self) else "policy"
        if self.scores_tokens:
            after_head(model)  # proven here, where a sharded model runs as a whole
        self._figures = ("entropy",) if kwargs.get("compute_entropy") else ()
        with self.reading_values(role, logits_to_keep) as values, positions_behind_padding(innermost(model)):
            result = super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
            )
        with torch.enable_grad():  # those of a head that learns alone have a gradient, where the policy's pass has none
            self.forwards[role] = Forward(result[0], torch.cat(values) if values else None)
        return result

    def show_advantages(self, advantages: list[float]) -> None:
        """Put the advantages of the last answers of all ranks into the table of completions, in place of RLOO's."""
        shown = self._logs["advantages"]
        for _ in range(min(len(advantages), len(shown))):
            shown.pop()
        shown.extend(advantages)

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        return PromptOrder.like(super()._get_train_sampler(dataset))

    @property
    def is_multimodal(self) -> bool:
        """Whether the processor is that of a vision-language model."""
        return self._is_vlm

    def answers_state(self) -> dict[str, Any]:
        """For a checkpoint: the answers that are not used up, how many micro-batches of them are, and how they are split."""
        used = self._step % (self.args.steps_per_generation * self.num_iterations)
        return {"micro_steps": used, "answers": self._buffered_inputs if used else None, "layout": self._layout()}

    def load_answers_state(self, state: Mapping[str, Any]) -> None:
        """Go on from `answers_state`.

        Raises:
            ConfigError: the answers are split in another way than this run's.
        """
        own = self._layout()
        if state["answers"] is not None and (saved := state.get("layout", own)) != own:
            raise ConfigError(
                f"the checkpoint keeps answers that are not used up, split into {saved}; expected {own}. Set these as they "
                "were, or go on from a checkpoint at the end of the epochs over a batch of answers"
            )
        self._step = state["micro_steps"]
        self._buffered_inputs = send_to_device(state["answers"], self.accelerator.device)

    def _layout(self) -> dict[str, int]:
        names = ("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation")
        return {**{name: getattr(self.args, name) for name in names}, "processes": self.accelerator.num_processes}


def is_reference(model: nn.Module, trainer: Any) -> bool:
    """Whether a model runs as the reference now: it is another model, or the policy under another adapter or none."""
    if model is trainer.ref_model:
        return True
    policy = trainer.accelerator.unwrap_model(trainer.model)
    return is_peft_model(policy) and (policy.active_adapter == "ref" or not policy.has_active_enabled_adapter)


class PromptOrder(RepeatSampler):
    """TRL's order of prompts, with a shuffle that depends on the epoch and not on the epochs that this process has seen."""

    @classmethod
    def like(cls, other: RepeatSampler) -> PromptOrder:
        """Make one with the settings of another."""
        return cls(
            other.data_source, other.mini_repeat_count, other.batch_size, other.repeat_count, other.shuffle, other.seed
        )

    def set_epoch(self, epoch: int) -> None:
        """Called by the loader before each epoch; the first epoch has TRL's own shuffle."""
        if self.shuffle:
            self.generator.manual_seed((self.seed or 0) + epoch)
