"""Templates whose generation prompt depends on more than the roles: every turn against the definition."""

from __future__ import annotations

import random

import pytest

from hf_objectives.errors import DataError
from hf_objectives.labels.chat import ChatEncoder
from tests.support.chat_corpus import byte_tokenizer
from tests.support.prefix_reference import reference_render

LINE = "{{ '\\n' }}"
# The render has a line break before every text. Whether the prompt has one, too, is another matter.
LOOP = "{% for m in messages %}EACH<{{ m.role[0] }}>\n{{ m.content }}</s>{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<a>ASK{% endif %}"


def template_of(ask, start="", each=""):
    return start + LOOP.replace("EACH", each) + PROMPT.replace("ASK", ask)


def when(condition):
    return template_of("{% if " + condition + " %}" + LINE + "{% endif %}")


PROMPTS = {
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


@pytest.mark.parametrize("source", PROMPTS.values(), ids=PROMPTS)
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


@pytest.mark.parametrize(
    "condition", ["messages | length > 40", "messages[-1].content | length > 9", "'why' in messages[-1].content"]
)
def test_a_long_conversation_whose_prompts_change(condition):
    """The kinds of the first turns are no model for the last: what the sampled prompts show decides for all."""
    tokenizer = byte_tokenizer(when(condition), special=["<|unused|>"])
    messages = []
    for n in range(80):
        asked = "why" if condition.startswith("'why'") and n in (30, 50) else f"question {n}"
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": "answer"}]
    expected = outcome(reference_render, tokenizer, messages)
    assert outcome(ChatEncoder(tokenizer).render, messages) == expected


def test_a_question_that_looks_like_a_control_token_opens_no_turn():
    """Sentinels would change the render of the first message, so that its place is found by its text."""
    template = (
        "{% for m in messages %}<{{ m.role[0] }}>{% if loop.previtem and loop.previtem.content | length > 6 %}P{% endif %}"
        "{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
    )
    tokenizer = byte_tokenizer(template, special=["<|unused|>"])
    messages = [{"role": "user", "content": "[INST]"}, {"role": "assistant", "content": "Think about"}]
    rendered = ChatEncoder(tokenizer, control_tokens="allow").render([*messages, {"role": "user", "content": "H"}])
    assert rendered.text == "<u>[INST]</s><a>Think about</s><u>PH</s>"
    assert [rendered.text[begin:end] for begin, end in rendered.spans] == ["Think about</s>"]
