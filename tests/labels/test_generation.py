"""The mask in a template: what transformers makes of it is what we train, or it is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import trl

from hf_objectives import demo
from hf_objectives.errors import TemplateError
from hf_objectives.labels import encode_chat, generation_template

TRLS = Path(trl.__file__).parent / "chat_templates"
#: Of the templates that TRL ships, those that take marks; of the rest, some refuse chats without images.
MARKED = """cohere cohere2 deepseek_r1_distill deepseekv3 gemma gemma3 gemma4_v2 lfm2 lfm2_2_5 lfm2_2_5_v2 lfm2_2_5_vl lfm2_v2
llama3_1 llama3_2 phi3 phi3_5 qwen2_5_vl qwen3 qwen3_5_nothink qwen3_5_think qwen3_6 qwen3_8 qwen3_instruct_2507
qwen3_vl""".split()
CHATS = [row["messages"] for row in demo.chats(30) if "tools" not in row][:5]


def masks(tokenizer, template, messages):
    made = tokenizer.apply_chat_template(
        messages, chat_template=template, return_dict=True, return_assistant_tokens_mask=True
    )
    return list(made["input_ids"]), list(made["assistant_masks"])


@pytest.mark.parametrize("name", MARKED)
def test_the_mask_of_a_template_is_ours_on_chats_that_it_was_not_tried_on(name):
    tokenizer = demo.build_tokenizer()
    tokenizer.chat_template = (TRLS / f"{name}.jinja").read_text()
    marked = generation_template(tokenizer)
    for messages in CHATS:
        row = encode_chat(tokenizer, messages)
        assert masks(tokenizer, marked, messages) == (row["input_ids"], [int(label != -100) for label in row["labels"]])
        assert tokenizer.apply_chat_template(
            messages, chat_template=marked, add_generation_prompt=True, tokenize=False
        ) == (tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    # Marks that are there already are taken for nothing.
    tokenizer.chat_template = marked
    assert masks(tokenizer, generation_template(tokenizer), CHATS[0]) == masks(tokenizer, marked, CHATS[0])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{% set c = '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' %}{{ c }}{% endfor %}"
         "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}", "no place for"),
        ("{% raw %}x{% endraw %}{{ messages[0].content }}", "raw block"),
        ("{% for m in messages %}{{ m.content }", "not valid Jinja"),
        ("{{ raise_exception('no chats') }}", "refuses every conversation"),
        (None, "no chat template"),
    ],
)  # fmt: skip
def test_what_cannot_be_marked_is_refused(template, message):
    tokenizer = demo.build_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(TemplateError, match=message):
        generation_template(tokenizer)


def test_a_text_that_ends_in_a_brace_before_an_output():
    """`call{` and an output in a row would read as the beginning of a mapping."""
    tokenizer = demo.build_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}{{ '\\n' }}{{{ '' }}{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer.chat_template = tokenizer.chat_template.replace("{{{ '' }}", "{{ '' }}{{ '{' }}{ {{ '' }}")
    row = encode_chat(tokenizer, CHATS[0])
    assert masks(tokenizer, generation_template(tokenizer), CHATS[0]) == (
        row["input_ids"], [int(label != -100) for label in row["labels"]]
    )  # fmt: skip
