"""Every contact with private parts of TRL's distillation; `trl_compat.py` has those that several of its trainers share.

`tests/trainers/test_trl_distillation.py` holds these contacts against the installed release.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from trl import DistillationTrainer
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
from trl.trainer.utils import maybe_gather_lm_head_ctx, pad

from hf_objectives.evaluation import HeadInputs
from hf_objectives.losses import token_log_probs
from hf_objectives.trainers.trl_compat import PromptOrder, TRLHooks

__all__ = ["DistillationHooks", "target_nats", "token_divergences"]


def token_divergences(
    student: HeadInputs, teacher: HeadInputs, *, beta: float, temperature: float
) -> tuple[Tensor, Tensor]:
    """Compute the generalised Jensen-Shannon divergence of single tokens by TRL's kernel, without all logits.

    With teacher P, student Q and M = beta P + (1 - beta) Q it is beta KL(P || M) + (1 - beta) KL(Q || M); under beta = 0 it
    is KL(P || Q), under beta = 1 KL(Q || P).

    Returns:
        The divergences, float32 [tokens] in nats, with gradient for the student; and the student's entropies, without.
    """
    one, other = student.after, teacher.after
    return ChunkedDivergenceFunction.apply(
        *(student.states, student.weight, student.bias, teacher.states, teacher.weight, teacher.bias),
        *(beta, temperature, one.scale, one.softcap, other.scale, other.softcap),
    )


@torch.no_grad()
def target_nats(head: HeadInputs, targets: Tensor) -> Tensor:
    """Negative log-likelihood of targets, int64 [tokens]; float32 [tokens]."""
    states, weight, bias, after = head
    with maybe_gather_lm_head_ctx(weight, bias):
        return -token_log_probs(states, weight, targets, bias=bias, **after._asdict()).log_probs


class DistillationHooks(TRLHooks, DistillationTrainer):
    """`trl.DistillationTrainer` with hooks."""

    hooks: ClassVar = {
        "tokenize_prompts": "_tokenize_prompts",
        "generate_answers": "_generate_single_turn",
        "answer": "_generate_and_score_completions",
    }
    _is_vlm: bool
    eos_token_ids: list[int]

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        return PromptOrder.like(super()._get_train_sampler(dataset))

    @property
    def is_multimodal(self) -> bool:
        """Whether the processor is that of a vision-language model."""
        return self._is_vlm

    def stop_at(self, ids: Iterable[int]) -> None:
        """Let answers also end with these tokens."""
        self.eos_token_ids = list(dict.fromkeys([*self.eos_token_ids, *ids]))
        self.generation_config.eos_token_id = self.generation_kwargs["eos_token_id"] = self.eos_token_ids

    def padded(self, rows: Sequence[Sequence[int]], value: int, side: str) -> Tensor:
        """Rows of ids as one tensor on the run's device, padded as TRL pads prompts and answers."""
        tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
        whole = pad(tensors, padding_value=value, padding_side=side, pad_to_multiple_of=self.pad_to_multiple_of)
        return whole.to(self.accelerator.device)

    def drop_booked(self, mode: str) -> Mapping[str, list[float]]:
        """Take what TRL would write with its next log of a mode."""
        booked = dict(self._metrics[mode])
        self._metrics[mode].clear()
        return booked
