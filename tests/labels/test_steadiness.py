"""Templates whose generation prompt depends on more than the kind of a turn: every turn against the definition."""

from __future__ import annotations

import random

import pytest

from hf_objectives.errors import DataError
from hf_objectives.labels.chat import ChatEncoder
from hf_objectives.labels.steadiness import steadiness
from tests.support.chat_corpus import ORIGINALS, byte_tokenizer, template
from tests.support.prefix_reference import reference_render

LINE = "{{ '\\n' }}"
# The render has a line break before every text. Whether the prompt has one, too, is another matter.
LOOP = "{% for m in messages %}EACH<{{ m.role[0] }}>\n{{ m.content }}</s>{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<a>ASK{% endif %}"


def template_of(ask, start="", each=""):
    return start + LOOP.replace("EACH", each) + PROMPT.replace("ASK", ask)


def when(condition):
    return template_of("{% if " + condition + " %}" + LINE + "{% endif %}")


UNSTEADY = {
    "more than four": when("messages | length > 4"),
    "every other turn": when("messages | length is divisibleby 4"),
    "limit given": when("messages | length > limit"),
    "long text": when("messages[-1].content | length > 4"),
    "first letter": when("messages[-1].content[0] == 'H'"),
    "two words": when("messages[-1].content.split(' ') | length > 1"),
    "capitals": when("messages[-1].content.isupper()"),
    "any text": when("'Hi' in messages | map(attribute='content') | join"),
    "joined with another text": when("('a' + messages[-1].content).startswith('aHi')"),
    "loop": template_of("{% for m in messages %}{% if m.content == 'Hi' %}" + LINE + "{% endif %}{% endfor %}"),
    "macro": template_of(
        "{{ f(messages[-1].content) }}",
        "{% set one = 1 %}{% macro f(t) %}{% if t | length > one %}" + LINE + "{% endif %}{% endmacro %}",
    ),
    "toggle": template_of(
        "{% if ns.on %}" + LINE + "{% endif %}", "{% set ns = namespace(on=false) %}", "{% set ns.on = not ns.on %}"
    ),
    "sum of lengths": template_of(
        "{% if ns.n > 30 %}" + LINE + "{% endif %}",
        "{% set ns = namespace(n=0) %}",
        "{% set ns.n = ns.n + m.content | length %}",
    ),
}
KEYED = {
    "equal": when("messages[-1].content == 'Hi'"),
    "any case": when("messages[-1].content | lower == 'hi'"),
    "word": when("'think' in messages[-1].content"),
    "begin": when("messages[-1].content.startswith('Hi')"),
    "end": when("messages[-1].content.endswith('?')"),
    "first text": when("'Hi' in messages[0].content"),
    "two texts": when("messages[-1].content == messages[0].content"),
    "longer prompt": template_of("\n<think>"),
    "word of the prompt": template_of("\nThink"),
}
TEXTS = [
    "Hi",
    "hi",
    "Hi!",
    "Hello there, my friend?",
    "think",
    "Think about it",
    "why?",
    "x",
    "<think>a",
    "</s>",
    "\nHi",
    "OK",
]


def outcome(render, *arguments, **options):
    try:
        rendered = render(*arguments, **options)
    except DataError as error:
        return type(error).__name__
    return rendered.text, [tuple(span) for span in rendered.spans]


@pytest.mark.parametrize("source", [*UNSTEADY.values(), *KEYED.values()], ids=[*UNSTEADY, *KEYED])
def test_turns_learnt_before_are_no_model_for_turns_with_another_prompt(source):
    tokenizer = byte_tokenizer(source, special=["<|unused|>"])
    encoder = ChatEncoder(tokenizer, control_tokens="allow", template_kwargs={"limit": 4})
    choose = random.Random(0)
    for _ in range(60):
        roles = ["system"] * choose.choice([0, 0, 1]) + ["user", "assistant"] * choose.choice([1, 2, 3, 4])
        messages = [{"role": role, "content": choose.choice(TEXTS)} for role in roles]
        if choose.random() < 0.3:  # no plain conversation
            messages[-1]["reasoning_content"] = "r"
        expected = outcome(reference_render, tokenizer, messages, limit=4)
        assert outcome(encoder.render, messages) == expected, messages


@pytest.mark.slow
def test_what_is_learnt_is_kept_for_templates_in_use():
    assert {name for name in ORIGINALS if not steadiness(template(name)).steady} == set()
    assert not any(steadiness(source).steady for source in UNSTEADY.values())
    assert all(steadiness(source).steady for source in KEYED.values())
