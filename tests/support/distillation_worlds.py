"""Small worlds for distillation: a student and a larger teacher over the words of PPO's worlds."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch

from hf_objectives.trainers.distillation import PerplexityDistillationTrainer
from hf_objectives.trainers.distillation_config import PerplexityDistillationConfig
from tests.support.ppo_worlds import SETTINGS, small_model, words

FIELDS = PerplexityDistillationConfig.__dataclass_fields__
#: `u a b ask c <eos>`: `ask` is the generation prompt.
TEMPLATE = (
    "{% for m in messages %}{{ ' u ' if m.role == 'user' else ' ask ' }}{{ m.content }}{{ ' <eos>' if m.role != 'user' }}"
    "{% endfor %}{% if add_generation_prompt %} ask{% endif %}"
)
LETTERS = words("ask", "u", "a", "b", "c", "d", "e")
LETTERS.chat_template = TEMPLATE
#: Chats of several lengths and turns.
CHATS = [
    [{"role": "user", "content": f"{question}"}, {"role": "assistant", "content": f"{answer}"}]
    for question, answer in [("a b", "c"), ("c", "d e"), ("e e e e", "a b c d"), ("b", "a"), ("d c", "b b"), ("a", "e")]
]
CHATS[1] += [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b c"}]
ROWS = [{"messages": chat} for chat in CHATS]


def loud(model: Any, seed: int = 3, scale: float = 0.4) -> Any:
    """The model with weights that give uneven distributions."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def student(**options: Any) -> Any:
    return loud(small_model(len(LETTERS), seed=0, **options), 3)


def teacher(**options: Any) -> Any:
    return loud(small_model(len(LETTERS), seed=1, **{"hidden_size": 32, "num_hidden_layers": 2, **options}), 4)


def distillation(
    folder,
    rows=None,
    *,
    model=None,
    of=None,
    tokenizer=LETTERS,
    kind=PerplexityDistillationTrainer,
    settle=lambda args: None,
    **options,
):
    """A trainer; what is no setting of its config goes to the trainer. `settle` is given the config before it is used."""
    settings = {"per_device_train_batch_size": 2, "max_completion_length": 4, "max_steps": 2, **SETTINGS}
    settings.pop("steps_per_generation")
    settings.update({key: options.pop(key) for key in [*options] if key in FIELDS})
    args = PerplexityDistillationConfig(str(folder), **settings)
    settle(args)
    return kind(
        student() if model is None else model,
        teacher() if of is None else of,
        args,
        train_dataset=ROWS if rows is None else rows,
        processing_class=tokenizer,
        teacher_processing_class=options.pop("teacher_processing_class", tokenizer),
        **options,
    )


def softmax(logits: list[float], temperature: float = 1.0) -> list[float]:
    """Probabilities, in float64 of plain Python."""
    exponentials = [math.exp((x - max(logits)) / temperature) for x in logits]
    return [x / sum(exponentials) for x in exponentials]


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a)


def divergence(teacher: list[float], student: list[float], beta: float, temperature: float = 1.0) -> float:
    """The generalised Jensen-Shannon divergence of arXiv 2306.13649, section 2, of two lists of logits; KL at its ends."""
    p, q = softmax(teacher, temperature), softmax(student, temperature)
    if beta == 0:
        return kl(p, q)
    if beta == 1:
        return kl(q, p)
    mixed = [beta * a + (1 - beta) * b for a, b in zip(p, q, strict=True)]
    return beta * kl(p, mixed) + (1 - beta) * kl(q, mixed)


def by_hand(run: Any, rows: list[tuple[list[int], list[int]]]) -> dict[str, float]:
    """Sums over the trained tokens of rows of ids and labels, each row alone and without padding, in float64.

    Returns:
        `tokens`, `divergence`, `entropy`, `nats` and `teacher_nats`.
    """
    models = [copy.deepcopy(one).double().eval() for one in (run.model, run.teacher_model)]
    sums = dict.fromkeys(("tokens", "divergence", "entropy", "nats", "teacher_nats"), 0.0)
    for ids, labels in rows:
        with torch.no_grad():
            ours, theirs = (one(input_ids=torch.tensor([ids])).logits[0].tolist() for one in models)
        for place, label in enumerate(labels[1:]):
            if label == -100:
                continue
            q, p = softmax(ours[place]), softmax(theirs[place])
            heated = softmax(ours[place], run.temperature)
            sums["tokens"] += 1
            sums["divergence"] += divergence(theirs[place], ours[place], run.beta, run.temperature)
            sums["entropy"] -= sum(x * math.log(x) for x in heated)
            sums["nats"] -= math.log(q[label])
            sums["teacher_nats"] -= math.log(p[label])
    return sums


def encoded(chats: list[list[dict]]) -> list[tuple[list[int], list[int]]]:
    """Ids and labels of chats, word by word: what stands after `ask`, to the end of the turn, is trained."""
    found = []
    for chat in chats:
        ids: list[int] = []
        labels: list[int] = []
        for message in chat:
            is_answer = message["role"] == "assistant"
            words_of = [*message["content"].split(), *(["<eos>"] if is_answer else [])]
            own = LETTERS.convert_tokens_to_ids(words_of)
            ids += [LETTERS.convert_tokens_to_ids("ask" if is_answer else "u"), *own]
            labels += [-100, *(own if is_answer else [-100] * len(own))]
        found.append((ids, labels))
    return found
