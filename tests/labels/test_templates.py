"""Chat templates: renders, control tokens, tools, and the contact with transformers."""

from __future__ import annotations

import re

import pytest
from transformers.utils import chat_template_utils

from hf_objectives.errors import TemplateError
from hf_objectives.labels.chat import encode_chat
from hf_objectives.labels.templates import Renderer, compile_template, control_tokens, template_of, tool_schema
from tests.support.chat_corpus import CHATML, ORIGINALS, PLAIN, TOOL, byte_tokenizer, template


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


def get_weather(city: str) -> str:
    """
    Get the weather.

    Args:
        city: The city.
    """
    return city


def test_functions_are_tools():
    """As in `apply_chat_template`: the schema is read from signature and docstring."""
    tokenizer = byte_tokenizer(template("qwen3"))
    row = encode_chat(tokenizer, TOOL, tools=[get_weather])
    assert row["input_ids"] == tokenizer.apply_chat_template(TOOL, tools=[get_weather], return_dict=False)
    assert row == encode_chat(tokenizer, TOOL, tools=[chat_template_utils.get_json_schema(get_weather)])
    with pytest.raises(TemplateError, match="no schema can be read from the function '<lambda>'"):
        tool_schema(lambda x: x)


@pytest.mark.parametrize(
    "expression",
    [
        *(
            "m.role",
            "m['role']",
            "m.missing",
            "m.missing is defined",
            "m.get('role')",
            "m.items() | list",
            "m.keys() | list",
        ),
        *("loop.first", "loop.index0", "loop.previtem", "loop.missing", "loop.cycle('a', 'b')", "loop._length"),
        *("ns.x", "ns.missing", "ns.__class__", "m.content.upper()", "m.content.missing", "'{}'.format(m.role)"),
        *(
            "m.content.__class__",
            "m.__class__",
            "m.update({})",
            "m.pop('role')",
            "loop.__init__",
            "'{0.__class__}'.format(m)",
        ),
        *(
            "messages.append(1)",
            "messages[0].content.format_map",
            "m.content.split.__self__",
            "ns.x.__class__",
            "m.clear",
        ),
    ],
)
def test_the_environment_reads_what_the_sandbox_reads_and_refuses_what_it_refuses(expression):
    source = "{% set ns = namespace(x=1) %}{% for m in messages %}{{ " + expression + " }}{% endfor %}"
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "{x}"}]

    def outcome(template):
        try:
            return re.sub("0x[0-9a-f]+", "", template.render(messages=messages))
        except Exception as error:
            return type(error).__name__, str(error)

    theirs = chat_template_utils._compile_jinja_template(source)
    assert outcome(compile_template(source)) == outcome(theirs)
    assert messages == [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "{x}"}]
