"""The critic of PPO: a value head on the policy's backbone or on one of its own, with an optimizer of its own."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import Trainer, get_scheduler

from hf_objectives.distributed import average_gradients
from hf_objectives.errors import ConfigError


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

    def forward(self, hidden: Tensor) -> Tensor:
        """Map hidden states [..., width] to values [...], in float32 under autocast too: bfloat16 has three digits."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.head(hidden.float()).squeeze(-1)

    def read(self, input_ids: Tensor, attention_mask: Tensor, keep: int) -> Tensor:
        """Compute values with the critic's own backbone: float32 [batch, keep], at the states before the last tokens."""
        assert self.backbone is not None
        out = self.backbone(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        return self(before_last(out.last_hidden_state, keep))

    @contextmanager
    def watching(self, policy: nn.Module, keep: int) -> Iterator[list[Tensor]]:
        """Within it, read the states of the policy's backbone: gives the values of each forward pass."""
        values: list[Tensor] = []

        def look(module: nn.Module, args: tuple, output: Any) -> None:
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

    Optimizer, schedule and clipping are those of the policy, with `critic_learning_rate`.
    """

    file: ClassVar[str] = "critic.pt"  # in a checkpoint

    def __init__(self, critic: Critic, args: Any, policy: nn.Module, num_training_steps: int) -> None:
        self.critic, self.args = critic, args
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(args, policy)  # type: ignore[arg-type]
        settings["lr"] = args.critic_learning_rate or args.learning_rate
        self._parameters = [parameter for parameter in critic.parameters() if parameter.requires_grad]
        self.optimizer = kind(self._parameters, weight_decay=args.weight_decay, **settings)
        self.scheduler = get_scheduler(
            args.lr_scheduler_type,
            optimizer=self.optimizer,
            num_warmup_steps=args.get_warmup_steps(num_training_steps),
            num_training_steps=num_training_steps,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )

    def step(self) -> None:
        """Average the gradients over processes, clip them, step, and clear them."""
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
