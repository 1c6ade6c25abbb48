"""Which templates look at what messages say, control tokens, and the contact with transformers."""

from __future__ import annotations

import pytest
from transformers.utils import chat_template_utils

from hf_objectives.errors import TemplateError
from hf_objectives.labels.templates import Renderer, compile_template, control_tokens, template_of, text_steers
from tests.support.chat_corpus import CHATML, ORIGINALS, PLAIN, byte_tokenizer, template


def test_contact_with_transformers():
    """If this fails, transformers moved: mend hf_objectives/labels/templates.py, the only place that imports it."""
    assert chat_template_utils._compile_jinja_template(CHATML).render(messages=PLAIN[:1]).startswith("<|im_start|>user")


@pytest.mark.parametrize("name", ORIGINALS)
def test_render_is_that_of_apply_chat_template(name):
    tokenizer = byte_tokenizer(template(name))
    blocks = name in ("idefics3", "smolvlm", "llava_next")
    messages = [{**m, "content": [{"type": "text", "text": m["content"]}]} if blocks else m for m in PLAIN]
    render = Renderer(tokenizer, template(name), None, {})
    for generation_prompt in (False, True):
        expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation_prompt)
        assert render(messages, generation_prompt=generation_prompt) == expected


@pytest.mark.parametrize(
    ("body", "steers"),
    [
        ("{{ m['content'] }}", False),
        ("{{ '<' + m.role + '>' + m.content | trim + eos_token }}", False),
        ("{% set c = m.content.strip() %}{{ c }}", False),
        ("{% if m.content is string %}{{ m.content }}{% endif %}", False),
        ("{% generation %}{{ m.content }}{% endgeneration %}", False),
        ("{% generation %}{{ m.content[::-1] if m.content == 'a' }}{% endgeneration %}", True),
        ("{% macro show(x) %}{{ x }}{% endmacro %}{% call show('a') %}{{ m.content }}{% endcall %}", True),
        ("{% if '/no_think' in m.content %}x{% endif %}{{ m.content }}", True),
        ("{% set c = m['content'] %}{% if c.startswith('a') %}x{% endif %}", True),
        ("{% set d = m.content + 'x' %}{% set c = d %}{% if c == 'ax' %}y{% endif %}", True),
        ("{{ m.content | length }}", True),
        ("{{ m.content.split('</think>')[-1] }}", True),
        ("{{ 'a' if m.content else 'b' }}", True),
        ("{% set ns.c = m.content %}{% if ns.c == 'a' %}x{% endif %}", True),
        ("{% for block in m.content %}{{ block }}{% endfor %}", True),
    ],
)
def test_text_steers(body, steers):
    assert text_steers("{% set ns = namespace() %}{% for m in messages %}" + body + "{% endfor %}") is steers


def test_templates_that_read_content_are_known_to():
    assert {name for name in ORIGINALS if not text_steers(template(name))} == {"gemma", "llama3", "phi3"}


def test_control_tokens_are_special_or_written_by_the_template_or_shaped_like_one():
    tokenizer = byte_tokenizer(template("qwen3"), special=["<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens(["<tool_call>", "<|fim_prefix|>", "<table>", "\n\n\n"])
    found = control_tokens(tokenizer, template("qwen3"))
    assert {"<|im_start|>", "<tool_call>", "<|fim_prefix|>"} <= set(found)
    assert "<table>" not in found and "\n\n\n" not in found


def test_missing_and_broken_templates():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(TemplateError, match="no chat template"):
        template_of(tokenizer, None, None)
    with pytest.raises(TemplateError, match="not valid Jinja"):
        compile_template("{% if %}")
    with pytest.raises(TemplateError, match="refuses this conversation: no"):
        Renderer(tokenizer, "{{ raise_exception('no') }}", None, {})(PLAIN)
    with pytest.raises(TemplateError, match="neither a JSON schema nor a function"):
        Renderer(tokenizer, CHATML, [3], {})
