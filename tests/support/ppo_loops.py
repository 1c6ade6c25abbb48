"""What a step of PPO is compared with: answers by script, kept models and gradients, and models read one answer at a time."""

from __future__ import annotations

import copy

import torch

from hf_objectives.trainers.critic import decoder_of
from tests.support.ppo_worlds import LETTERS, ScriptedPPO

SCRIPT = {
    "ask a": "b c <eos>", "ask b": "a", "ask a b c": "a a <eos>", "ask d": "<eos>", "ask e": "e d c b",
    "ask b b": "c a a <eos>", "ask c": "a a a a", "ask d d d d": "b <eos>",
}  # fmt: skip


class Recorded(ScriptedPPO):
    """Keeps policy and critic as they are before each step, and the gradients after it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.before, self.gradients = [], []

    def training_step(self, model, inputs, num_items_in_batch):
        if self._step % self.args.gradient_accumulation_steps == 0:
            self.before.append((copy.deepcopy(self.model), copy.deepcopy(self.critic)))
        return super().training_step(model, inputs, num_items_in_batch)

    def _get_grad_norm(self, model, grad_norm=None):
        parameters = [*self.model.named_parameters(), *(self.critic.named_parameters("critic") if self.critic else ())]
        self.gradients.append({name: p.grad.clone() for name, p in parameters if p.grad is not None})
        return super()._get_grad_norm(model, grad_norm)


def pairs() -> list[tuple[list[int], list[int]]]:
    return [(LETTERS(prompt)["input_ids"], LETTERS(answer)["input_ids"]) for prompt, answer in SCRIPT.items()]


def read(policy, critic, temperature: float):
    """Log-probabilities, entropies and values of each answer's tokens, one conversation at a time, without padding."""
    found = []
    for prompt, answer in pairs():
        ids, width = torch.tensor([prompt + answer]), len(answer)
        states = decoder_of(policy)(ids).last_hidden_state
        logps = (policy.get_output_embeddings()(states)[0, -width - 1 : -1] / temperature).log_softmax(-1)
        own = [logps[t, token] for t, token in enumerate(answer)]
        entropies = [-(one.exp() * one).sum() for one in logps]
        values = [torch.zeros(())] * width
        if critic is not None:
            seen = states if critic.backbone is None else critic.backbone(ids).last_hidden_state
            values = [seen[0, len(prompt) - 1 + t] @ critic.head.weight[0] + critic.head.bias[0] for t in range(width)]
        found.append((own, entropies, values))
    return found
