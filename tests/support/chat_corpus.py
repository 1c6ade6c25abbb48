"""Conversations, tokenizers and TRL's chat templates for the tests of labels."""

from __future__ import annotations

import re
from pathlib import Path

import trl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
ORIGINALS = sorted(path.stem for path in TEMPLATES.glob("*.jinja") if not path.stem.endswith("_training"))
TWINS = [name for name in ORIGINALS if (TEMPLATES / f"{name}_training.jinja").exists()]

_CONTROL = re.compile(
    r"<\|[^|\s'\"{}]*\|>|<｜[^｜]*｜>|</?s>|<start_of_turn>|<end_of_turn>|<end_of_utterance>"
    r"|<\|turn>|<turn\|>|<\|tool_call>|<tool_call\|>|<\|tool_response>|<tool_response\|>|<\|channel>|<channel\|>"
    r"|</?think>|</?tool_call>|<sop>|\[gMASK\]"
)

PLAIN = [
    {"role": "user", "content": "What is 2+2?"},
    {"role": "assistant", "content": "It is four."},
    {"role": "user", "content": "And 3+3?"},
    {"role": "assistant", "content": "That makes six."},
]
SYSTEM = [{"role": "system", "content": "Be brief."}, *PLAIN[:2]]
REASONING = [
    PLAIN[0],
    {**PLAIN[1], "reasoning_content": "two and two"},
    PLAIN[2],
    {**PLAIN[3], "reasoning_content": "three plus three"},
]
CALL = {"id": "abc123def", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}
TOOL = [
    {"role": "user", "content": "Weather in Paris?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "get_weather", "tool_call_id": "abc123def", "content": "sunny"},
    {"role": "assistant", "content": "It is sunny."},
    {"role": "user", "content": "Thanks"},
    {"role": "assistant", "content": "Welcome."},
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Get the weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "the city"}},
                "required": ["city"],
            },
        },
    }
]
CONVERSATIONS = {"plain": PLAIN, "system": SYSTEM, "reasoning": REASONING, "tool": TOOL}

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def template(name: str) -> str:
    return (TEMPLATES / f"{name}.jinja").read_text()


def byte_tokenizer(
    chat_template: str = CHATML, *, special: list[str] | None = None, **names: str
) -> PreTrainedTokenizerFast:
    """One token per byte, and one per control token of the template: spans can be read off to the letter."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    names = {"eos_token": "<|im_end|>", "bos_token": "<|bos|>", "pad_token": "<|im_end|>", **names}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    control = sorted(set(_CONTROL.findall(chat_template))) if special is None else special
    tokenizer.add_special_tokens({"additional_special_tokens": control})
    tokenizer.chat_template = chat_template
    return tokenizer


def with_bos(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The tokenizer, made to put its BOS before every text, as Llama's and Gemma's do."""
    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    return tokenizer


def trained_text(tokenizer, row: dict) -> str:
    """What the labels spell."""
    return tokenizer.decode([label for label in row["labels"] if label != -100])


def trained_runs(tokenizer, row: dict) -> list[str]:
    """What each contiguous run of labels spells."""
    runs: list[list[int]] = []
    previous = -100
    for label in row["labels"]:
        if label != -100:
            if previous == -100:
                runs.append([])
            runs[-1].append(label)
        previous = label
    return [tokenizer.decode(run) for run in runs]
