"""A byte-level BPE tokenizer that is trained on the corpus, a tiny Llama, and the share of questions that a model answers."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_objectives.demo.corpus import SYSTEM, TOOLS, questions, texts
from hf_objectives.demo.skills import SKILLS, Question

#: ChatML with tools: the shape of most templates in use, small enough to read.
CHAT_TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content }}
{%- if loop.first and message.role == 'system' and tools %}
{{- '\\nTools:' }}
{%- for tool in tools %}
{{- ' ' + tool.function.name }}
{%- endfor %}
{%- endif %}
{%- for call in message.tool_calls or [] %}
{{- '<tool_call>' + call.function.name + ' ' + call.function.arguments | tojson + '</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}"""


def build_tokenizer(vocab_size: int = 640) -> PreTrainedTokenizerFast:
    """A byte-level BPE of the corpus; every digit is a token, EOS is `<|im_end|>`, and padding a token of its own."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained(vocab_size)),
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|im_start|>", "<tool_call>", "</tool_call>"],
        model_max_length=512,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@functools.cache
def _trained(vocab_size: int) -> str:
    """The BPE as JSON, of which each tokenizer is made anew."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>", "<tool_call>", "</tool_call>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    frame = f"system\n{SYSTEM}\nTools: calculator\nuser\nassistant\ntool\n"
    corpus = [row["text"] for row in texts(4000, skills=tuple(SKILLS))] + [frame] * 500
    corpus += [question.answer for question in questions(2000)]  # an answer begins a turn
    backend.train_from_iterator([*corpus, *(str(tool) for tool in TOOLS)], trainer)
    return backend.to_str()


def build_model(tokenizer: Any, *, hidden_size: int = 96, num_layers: int = 3, seed: int = 0) -> LlamaForCausalLM:
    """A tiny Llama with random weights, fixed by the seed, in float32."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        # With tied embeddings logits begin at variance 1; at the usual 0.02 a short run is spent on its first plateau.
        initializer_range=hidden_size**-0.5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


@torch.no_grad()
def exact_match(
    model: nn.Module, tokenizer: Any, asked: Sequence[Question], *, max_new_tokens: int = 48
) -> tuple[float, list[tuple[Question, str]]]:
    """Answer questions greedily, one a conversation; where a calculator is needed, its call is the answer.

    Returns:
        The share of answers that are right to the letter, and each question with its answer.
    """
    framed = {False: ([], None), True: ([{"role": "system", "content": SYSTEM}], TOOLS)}
    prompts = []
    for question in asked:
        system, tools = framed[bool(question.expression)]
        messages = [*system, {"role": "user", "content": question.question}]
        prompts.append(tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True, tokenize=False))
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
    said = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :])
    ends = (tokenizer.eos_token, tokenizer.pad_token)
    answers = [
        (question, min((text.split(end)[0] for end in ends), key=len).strip())
        for question, text in zip(asked, said, strict=True)
    ]
    return sum(text == expected(question) for question, text in answers) / len(answers), answers


def expected(question: Question) -> str:
    """What a model has to say to a question: the answer, or the call of the calculator."""
    if not question.expression:
        return question.answer
    return f"<tool_call>calculator {json.dumps({'expression': question.expression})}</tool_call>"
