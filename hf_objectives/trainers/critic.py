"""The critic of PPO: a value head on the policy's backbone or on one of its own, with an optimizer of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, get_scheduler

from hf_objectives.distributed import average_gradients
from hf_objectives.errors import ConfigError
from hf_objectives.trainers.hf_compat import positions_behind_padding
from hf_objectives.trainers.reward_functions import load_scorer
from hf_objectives.trainers.trl_compat import disable_dropout_in_model


class Critic(nn.Module):
    """Values of the states before each token of an answer; the head begins at 0. Every process holds the whole critic.

    `backbone` is a decoder of the critic's own; None for a head on the policy's.
    """

    backbone: Any

    def __init__(self, policy: nn.Module, backbone: Any = None) -> None:
        super().__init__()
        self.backbone = backbone
        decoder: Any = decoder_of(policy)
        width = (backbone or decoder).config.get_text_config().hidden_size
        self.head = nn.Linear(width, 1, device=next(decoder.parameters()).device, dtype=torch.float32)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    @classmethod
    def of(cls, policy: Any, kind: str, model: Any = None) -> Critic | None:
        """Make the critic that `PPOConfig.critic` names.

        A separate one begins with the backbone of `model` (a reward model, for example) and, if it has one, its score head;
        with None, with a copy of the policy's backbone.
        """
        if model is not None and kind != "separate":
            raise ConfigError(f"critic_model is given and critic is {kind!r}; expected 'separate'")
        if kind == "none":
            return None
        if kind == "shared":
            return cls(policy)
        if model is None:
            if hasattr(policy, "merge_and_unload"):  # its adapters are part of what it knows
                backbone = copy.deepcopy(policy).merge_and_unload().base_model
            else:
                backbone = copy.deepcopy(decoder_of(policy))
            return cls(policy, backbone.requires_grad_(True))
        given, known = (lm.get_input_embeddings().num_embeddings for lm in (model, policy))
        if given != known:
            raise ConfigError(
                f"critic_model has {given:,} token embeddings, the policy {known:,}; expected one vocabulary"
            )
        critic = cls(policy, copy.deepcopy(model.base_model).requires_grad_(True))  # a copy: the model may give rewards
        if isinstance(score := getattr(model, "score", None), nn.Linear) and score.out_features == 1:
            critic.head.weight.data.copy_(score.weight.data)
            if score.bias is not None:
                critic.head.bias.data.copy_(score.bias.data)
        return critic

    @classmethod
    def for_run(cls, policy: Any, args: Any, model: Any, device: torch.device) -> Critic | None:
        """Make the critic of a `PPOConfig` for training; `model` as in `of`, or its path. None without a critic."""
        if isinstance(model, str):
            model, has_head = load_scorer(model)
            if not has_head and hasattr(model, "score"):
                nn.init.zeros_(model.score.weight)
        critic = cls.of(policy, args.critic, model)
        if critic is None:
            return None
        if args.disable_dropout:
            disable_dropout_in_model(critic)
        if args.gradient_checkpointing and critic.backbone is not None:
            critic.backbone.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs)
        return critic.to(device).train()  # in evaluation mode it would not checkpoint

    def forward(self, hidden: Tensor) -> Tensor:
        """Map hidden states [..., width] to values [...], in float32 under autocast too: bfloat16 has three digits."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.head(hidden.float()).squeeze(-1)

    def read(self, input_ids: Tensor, attention_mask: Tensor, keep: int) -> Tensor:
        """Compute values with the critic's own backbone: float32 [batch, keep], at the states before the last tokens."""
        assert self.backbone is not None
        with positions_behind_padding(self.backbone):
            out = self.backbone(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        return self(before_last(out.last_hidden_state, keep))

    def read_answers(self, answers: Mapping[str, Tensor], size: int | None = None) -> Tensor:
        """Compute values of the tokens of answers, `size` rows at once; see `read`.

        Args:
            answers: `prompt_ids`, `prompt_mask`, `completion_ids`, `completion_mask`, int64 [batch, length].
            size: None for all.
        """
        keep = answers["completion_ids"].shape[1]
        both = [
            torch.cat([answers[f"prompt_{part}"], answers[f"completion_{part}"]], dim=1) for part in ("ids", "mask")
        ]
        parts = zip(*(part.split(size or len(part)) for part in both), strict=True)
        return torch.cat([self.read(ids, mask, keep) for ids, mask in parts])

    @contextmanager
    def watching(self, policy: nn.Module, keep: int, *, alone: bool = False) -> Iterator[list[Tensor]]:
        """Within it, read the states of the policy's backbone: gives the values of each forward pass.

        With `alone` the head has a gradient where the policy's pass keeps none.
        """
        values: list[Tensor] = []

        def look(module: nn.Module, args: tuple, output: Any) -> None:
            with torch.set_grad_enabled(alone or torch.is_grad_enabled()):
                values.append(self(before_last(output.last_hidden_state, keep)))

        handle = decoder_of(policy).register_forward_hook(look)
        try:
            yield values
        finally:
            handle.remove()


def before_last(hidden: Tensor, keep: int) -> Tensor:
    """The states from which the last `keep` tokens were chosen: [batch, length, width] to [batch, keep, width]."""
    return hidden[:, -keep - 1 : -1]


def decoder_of(policy: nn.Module) -> Any:
    """The backbone of a causal language model, below its adapters and its head."""
    inner: Any = getattr(policy, "get_base_model", lambda: policy)()
    return inner.base_model


class CriticOptimizer:
    """Steps the critic when the policy's optimizer has stepped, and is saved with it.

    Optimizer, schedule and clipping are those of the policy, with `critic_learning_rate`. The gradient is clipped by its own
    norm, not together with the policy's.

    Args:
        critic: the critic.
        args: a `PPOConfig`.
        policy: which some optimizers ask for.
        num_training_steps: the length of the schedule.
        decayed: names of the critic's parameters that `weight_decay` is for.
    """

    file: ClassVar[str] = "critic.pt"  # in a checkpoint

    def __init__(
        self, critic: Critic, args: Any, policy: nn.Module, num_training_steps: int, *, decayed: Collection[str]
    ) -> None:
        self.critic, self.args = critic, args
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(args, policy)  # type: ignore[arg-type]
        settings["lr"] = args.critic_learning_rate or args.learning_rate
        named = [(name, parameter) for name, parameter in critic.named_parameters() if parameter.requires_grad]
        self._parameters = [parameter for _, parameter in named]
        parts = [[parameter for name, parameter in named if (name in decayed) is wanted] for wanted in (True, False)]
        groups = zip(parts, (args.weight_decay, 0.0), strict=True)
        self.optimizer = kind([{"params": part, "weight_decay": decay} for part, decay in groups], **settings)
        self.scheduler = get_scheduler(
            args.lr_scheduler_type,
            optimizer=self.optimizer,
            num_warmup_steps=args.get_warmup_steps(num_training_steps),
            num_training_steps=num_training_steps,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )

    def step(self) -> None:
        """Average the gradients over processes, clip them, step, and clear them.

        After a step of the policy that was left out there is no gradient on any process: the schedule alone goes on.
        """
        if all(parameter.grad is None for parameter in self._parameters):
            self.scheduler.step()
            return
        average_gradients(self._parameters)
        if self.args.max_grad_norm:
            nn.utils.clip_grad_norm_(self._parameters, self.args.max_grad_norm)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()

    def save(self, folder: Path) -> None:
        """Write weights, optimizer and schedule to a file in the folder."""
        parts = {"critic": self.critic, "optimizer": self.optimizer, "scheduler": self.scheduler}
        torch.save({name: part.state_dict() for name, part in parts.items()}, folder / self.file)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote."""
        if not (folder / self.file).exists():
            raise ConfigError(f"{folder} has no {self.file}; it is no checkpoint of a PPO run with a critic")
        device = self.critic.head.weight.device
        state = torch.load(folder / self.file, map_location=device, weights_only=True)
        missing, unexpected = self.critic.load_state_dict(state["critic"], strict=False)
        if missing or unexpected:
            raise ConfigError(
                f"the critic in {folder} is of another kind: {len(missing)} weights are missing, {len(unexpected)} too many"
            )
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])


class CriticSteps(TrainerCallback):
    """Steps the critic when the policy steps; `optimizer` gives the critic's, or None without one."""

    def __init__(self, optimizer: Callable[[], CriticOptimizer | None]) -> None:
        self._optimizer = optimizer

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called after the policy's step."""
        if (optimizer := self._optimizer()) is not None:
            optimizer.step()
