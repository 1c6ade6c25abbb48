"""Where turns end under templates that print the end of a turn, or of a conversation, in their own way."""

from __future__ import annotations

import pytest

from hf_objectives.labels.chat import encode_chat
from tests.support.chat_corpus import PLAIN, TOOL, TOOLS, byte_tokenizer, trained_runs

# User and tool speak between <u>, <t> and </s>; `{answer}` is how the assistant does, `{last}` what is printed at the end.
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}<u>{{ m.content }}</s>"
    "{% elif m.role == 'tool' %}<t>{{ m.content }}</s>{% else %}{answer}{% endif %}{% endfor %}{last}"
)
CALL = "{% if m.tool_calls %}{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}{% endif %}"
PROMPT = "{% if add_generation_prompt %}<a>{% endif %}"
CALLED = '{"name": "get_weather", "arguments": {"city": "Paris"}}'


def runs(messages, answer, last, *, tools=None, eos_token="<eos>"):
    template = TEMPLATE.replace("{answer}", answer).replace("{last}", last)
    special = ["<u>", "<t>", "<a>", "</s>", "<sep>", "<call>", "</call>"]
    tokenizer = byte_tokenizer(template, special=special, eos_token=eos_token)
    row = encode_chat(tokenizer, messages, tools=tools)
    assert row["input_ids"] == tokenizer.apply_chat_template(messages, tools=tools, return_dict=False)
    return trained_runs(tokenizer, row)


@pytest.mark.parametrize("eos_token", ["<eos>", "</s>"])
def test_a_header_that_is_printed_unasked_closes_no_turn(eos_token):
    spans = runs(PLAIN, "{{ m.content }}</s>", "{% if messages[-1].role != 'x' %}<a>{% endif %}", eos_token=eos_token)
    assert spans == ["It is four.</s>", "That makes six.</s>"]


def test_a_header_of_every_turn_in_two_tokens_closes_none():
    """Command A: the template begins the next answer's turn after an answer, asked or not."""
    spans = runs(PLAIN, "{{ m.content }}<call></s>", "<u><a>{% if add_generation_prompt %}<sep>{% endif %}")
    assert spans == ["It is four.<call></s>", "That makes six.<call></s>"]


def test_a_separator_before_plain_words_still_closes_turns():
    """Reka: no token opens a turn, and the one before the prompt's words is the stop of the turn before."""
    answer = "bot: {{ m.content }}" + CALL.replace("tojson }}", "tojson }}</call>") + "{{ '\\n\\n' }}<sep>"
    spans = runs(TOOL, answer, "{% if add_generation_prompt %}bot:{% endif %}", tools=TOOLS)
    assert spans == [f" {CALLED}</call>\n\n<sep>", " It is sunny.\n\n<sep>", " Welcome.\n\n<sep>"]


def test_a_call_that_is_printed_in_another_way_at_the_end_of_a_conversation():
    """Apriel: a call shows its id, before the brackets that close it, only where the conversation goes on."""
    answer = "{% set last = loop.last %}<a>{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}"
    answer += "{{ '' if last else ' ' ~ c.id }}</call>{% endfor %}</s>"
    spans = runs(TOOL, answer, PROMPT, tools=TOOLS)
    assert spans == [f"{CALLED} abc123def</call></s>", "It is sunny.</s>", "Welcome.</s>"]
    assert runs(TOOL[:2], answer, PROMPT, tools=TOOLS) == [f"{CALLED}</call></s>"]


def test_instructions_that_are_repeated_at_the_end_are_not_the_answer():
    """Command R+: a call has no stop of its own, and the user speaks again at the end of every conversation."""
    answer = "<a>{{ m.content }}" + CALL + "{{ '```\\n' if m.tool_calls else '</s>' }}"
    again = "<u>Answer with a call.</s>" + PROMPT
    assert runs(PLAIN, answer, again) == ["It is four.</s>", "That makes six.</s>"]
    assert runs(TOOL[:2], answer, again, tools=TOOLS) == [f"{CALLED}```"]


def test_white_space_that_depends_on_what_follows():
    """Nemotron Nano v2: another line break before the brackets that close a call once the conversation goes on."""
    answer = "{% set w = ' ' if loop.last else '\\n' %}<a>{{ m.content }}" + CALL + "{{ w }}</call>{{ w }}<sep>"
    spans = runs(TOOL, answer, PROMPT, tools=TOOLS)
    assert spans == [f"{CALLED}\n</call>\n<sep>", "It is sunny.\n</call>\n<sep>", "Welcome. </call> <sep>"]


@pytest.mark.parametrize("eos_token", ["<eos>", "</s>"])
@pytest.mark.parametrize("blank", ["", " ", "\\n"])
def test_the_stop_of_an_empty_system_turn_is_no_opener(blank, eos_token):
    """Zephyr, without a system message: the conversation begins with a turn in which nothing is said."""
    template = (
        "{% if messages[0].role != 'system' %}<sys>BLANK</s>{% endif %}".replace("BLANK", "{{ '" + blank + "' }}")
        + "{% for m in messages %}{{ '<' + m.role[0] + '>' + m.content }}</s>{% endfor %}" + PROMPT
    )  # fmt: skip
    tokenizer = byte_tokenizer(template, special=["<sys>", "<u>", "<a>", "</s>"], eos_token=eos_token)
    assert trained_runs(tokenizer, encode_chat(tokenizer, PLAIN)) == ["It is four.</s>", "That makes six.</s>"]
