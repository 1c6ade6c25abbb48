"""Where turns start under templates made to be awkward."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_objectives.errors import TemplateError
from hf_objectives.labels.chat import encode_chat
from tests.support.chat_corpus import PLAIN, TOOL, TOOLS, byte_tokenizer, trained_runs

FOR, ENDFOR = "{% for m in messages %}", "{% endfor %}"


def runs(template, messages=PLAIN, **options):
    tokenizer = byte_tokenizer(template, special=["<|im_end|>", "<u>", "<a>", "</s>"], eos_token="</s>")
    return trained_runs(tokenizer, encode_chat(tokenizer, messages, **options))


def test_history_that_is_rendered_in_another_way():
    """Earlier turns are shortened once later ones follow: no prompt of an earlier turn is a prefix of the render."""
    template = (
        "{% set n = messages | length %}" + FOR + "{% if m.role == 'user' %}<u>{{ 'Q: ' if loop.index < n - 1 else '' }}"
        "{{ m.content }}{% else %}<a>{{ m.content }}</s>{% endif %}" + ENDFOR
        + "{% if add_generation_prompt %}<a>{% endif %}"
    )  # fmt: skip
    assert runs(template) == ["It is four.</s>", "That makes six.</s>"]


def test_text_after_the_last_turn_only():
    template = FOR + "<{{ m.role[0] }}>{{ m.content }}<|im_end|>\n" + ENDFOR
    template += "{% if add_generation_prompt %}<a>{% else %}</s>{% endif %}"
    assert runs(template) == ["It is four.<|im_end|>", "That makes six.<|im_end|>"]


def test_no_generation_prompt_and_no_stop_marker():
    template = FOR + "{{ 'User' if m.role == 'user' else 'Bot' }}: {{ m.content }}\n" + ENDFOR
    assert runs(template) == [
        "Bot: It is four.",
        "Bot: That makes six.",
    ]  # nothing supplies the header: it is generated


def test_plain_words_as_headers():
    template = FOR + "### {{ 'Human' if m.role == 'user' else 'Assistant' }}:\n{{ m.content | trim }}\n\n" + ENDFOR
    template += "{% if add_generation_prompt %}### Assistant:\n{% endif %}"
    assert runs(template) == ["It is four.", "That makes six."]


def test_bos_between_turns_is_not_the_stop():
    template = (
        FOR + "{% if m.role == 'user' %}<u>{{ m.content }}{% else %}<a>{{ m.content }}</s><s>{% endif %}" + ENDFOR
    )
    template += "{% if add_generation_prompt %}<a>{% endif %}"
    assert runs(template) == ["It is four.</s>", "That makes six.</s>"]


def test_a_turn_that_is_printed_around_another_is_an_error():
    template = (
        FOR + "{% if loop.last %}<a>{{ m.content }}<u>{{ messages[0].content }}{{ m.content }}</s>{% endif %}" + ENDFOR
    )
    with pytest.raises(TemplateError, match="prints message 0 inside this turn"):
        runs(template, PLAIN[:2])


def test_a_template_that_looks_at_the_end_of_a_text():
    template = FOR + "<{{ m.role[0] }}>{{ m.content }}{{ '!' if m.content.endswith('?') else '' }}</s>" + ENDFOR
    template += "{% if add_generation_prompt %}<a>{% endif %}"
    assert runs(template) == ["It is four.</s>", "That makes six.</s>"]


def test_a_header_that_cannot_be_found_is_an_error_and_no_guess():
    template = FOR + "[{{ m.role }} of {{ messages | length }}]{{ m.content }}</s>" + ENDFOR
    template += "{% if add_generation_prompt %}<a>{% endif %}"
    with pytest.raises(TemplateError, match="cannot tell where this turn starts") as caught:
        runs(template)
    assert caught.value.turn == 1


def test_no_generation_prompt_and_tools_before_the_last_question_only():
    """Mistral: no prompt of an earlier turn is a prefix of the render, and none holds a header to look for."""
    template = (
        FOR + "{% if m.role == 'user' %}"
        "{% if loop.index == messages | length - 1 %}[TOOLS]{{ tools | tojson }}[/TOOLS]{% endif %}"
        "[INST] {{ m.content }}[/INST]{% elif m.role == 'tool' %}[RESULT]{{ m.content }}[/RESULT]"
        "{% elif m.tool_calls %}[CALLS]{{ m.tool_calls[0].function | tojson }}</s>{% else %} {{ m.content }}</s>{% endif %}"
        + ENDFOR
    )  # fmt: skip
    call = '[CALLS]{"name": "get_weather", "arguments": {"city": "Paris"}}</s>'
    assert runs(template, TOOL, tools=TOOLS) == [call, " It is sunny.</s>", " Welcome.</s>"]


def test_an_answer_that_goes_on_in_the_turn_of_its_call():
    """Gemma 4: after a tool result the assistant's turn is still open, so that no header precedes the answer."""
    template = (
        FOR + "{% if m.role == 'user' %}<u>{{ m.content }}{{ '!' * (messages | length) }}</s>"
        "{% elif m.role == 'tool' %}<r>{{ m.content }}</r>{% else %}"
        "{% if loop.index0 == 0 or loop.previtem.role != 'tool' %}<a>{% endif %}{{ m.content }}"
        "{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}<r>{% else %}</s>{% endif %}{% endif %}" + ENDFOR
        + "{% if add_generation_prompt and messages[-1].role != 'tool' %}<a>{% endif %}"
    )  # fmt: skip
    call = '{"name": "get_weather", "arguments": {"city": "Paris"}}'
    special = ["<u>", "<a>", "</s>", "<r>", "</r>"]
    tokenizer = byte_tokenizer(template, special=special, eos_token="</s>")
    row = encode_chat(tokenizer, TOOL, tools=TOOLS)
    assert trained_runs(tokenizer, row) == [f"{call}<r>", "It is sunny.</s>", "Welcome.</s>"]


TOKENIZER = byte_tokenizer()
said = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Co", "Cn"]), min_size=1, max_size=20).filter(
    str.strip
)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(st.lists(said, min_size=2, max_size=6), said)
def test_whatever_is_said_chatml_trains_the_answers(texts, system):
    messages = [{"role": "system", "content": system}]
    messages += [
        {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts[: len(texts) // 2 * 2])
    ]
    row = encode_chat(TOKENIZER, messages)
    expected = [message["content"] + "<|im_end|>" for message in messages if message["role"] == "assistant"]
    assert trained_runs(TOKENIZER, row) == expected
