"""The budget of a render: steps, seconds, each thread its own."""

from __future__ import annotations

import threading

import pytest

from hf_objectives.errors import TemplateError
from hf_objectives.labels import template_budget
from hf_objectives.labels.templates import Renderer
from tests.support.chat_corpus import PLAIN, byte_tokenizer

NESTED = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr(template_budget, "MAX_STEPS", 300_000)


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def test_the_clock_ends_what_steps_do_not_count(tokenizer, monkeypatch):
    monkeypatch.setattr(template_budget, "MAX_SECONDS", 0.0)
    with pytest.raises(TemplateError, match="takes over 0 seconds"):
        Renderer(tokenizer, "{% for i in range(9999) %}{% endfor %}", None, {})(PLAIN)


def test_limits_hold_in_threads_each_with_a_budget_of_its_own(tokenizer):
    outcomes = {}

    def render(name: str, template: str) -> None:
        try:
            outcomes[name] = Renderer(tokenizer, template, None, {})(PLAIN)
        except TemplateError as error:
            outcomes[name] = str(error)

    # Nine threads of 60,000 steps each, and a budget of 300,000.
    fine = {str(i): "{% for i in range(60000) %}{% endfor %}ok" for i in range(9)}
    threads = [threading.Thread(target=render, args=item) for item in {**fine, "bad": NESTED}.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert "steps for one conversation" in outcomes.pop("bad")
    assert set(outcomes.values()) == {"ok"}
