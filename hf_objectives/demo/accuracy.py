"""How many of the corpus's questions a model answers to the letter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from hf_objectives.demo.corpus import SYSTEM
from hf_objectives.demo.skills import Question


@torch.no_grad()
def exact_match(
    model: nn.Module, tokenizer: Any, asked: Sequence[Question], *, max_new_tokens: int = 32
) -> tuple[float, list[tuple[Question, str]]]:
    """Greedy answers to questions, and the share of them that is right to the letter."""
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question.question}],
            add_generation_prompt=True,
            tokenize=False,
        )
        for question in asked
    ]
    device = next(model.parameters()).device
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    was_training = model.training
    model.eval()
    out = model.generate(  # type: ignore[operator]
        input_ids=batch["input_ids"].to(device),
        attention_mask=batch["attention_mask"].to(device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.train(was_training)
    said = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    answers = [(question, text.strip()) for question, text in zip(asked, said, strict=True)]
    return sum(text == question.answer for question, text in answers) / len(answers), answers
