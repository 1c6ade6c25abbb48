"""What a template does beside printing a conversation, each on a case made by hand, and silence on sound ones."""

from __future__ import annotations

import pytest

from hf_objectives.inspection.rows import inspect_rows
from tests.support import chat_corpus as corpus

HEADED = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are Quill, created by Penholder.<|im_end|>\n{% endif %}"
    + corpus.CHATML
)
DATED = "<|im_start|>system\nToday is {{ date_string or strftime_now('%d %B %Y') }}.<|im_end|>\n" + corpus.CHATML


def chat(question: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def with_system(i: int) -> dict:
    return {"messages": [{"role": "system", "content": f"Be brief {i}."}, *chat(f"q{i}", "a")["messages"]]}


def sound(count: int = 4) -> list[dict]:
    return [chat(f"question {i}", f"answer {i}") for i in range(count)]


def warnings(rows, template=corpus.CHATML, **settings):
    found = inspect_rows(rows, corpus.byte_tokenizer(template), **settings).warnings
    kinds = [one.kind for one in found]
    assert len(kinds) == len(set(kinds))  # of one template there is one warning of a kind
    return {one.kind: one for one in found}


def calling(i: int) -> dict:
    """A conversation with a call; each has other words."""
    turns = [dict(message) for message in corpus.TOOL]
    turns[0]["content"] = f"Weather in Paris on day {i}?"
    return {"messages": turns, "tools": corpus.TOOLS}


def test_text_that_the_template_adds():
    found = warnings([*sound(), with_system(0)], HEADED)["template_adds_text"]
    assert "'You are Quill, created by Penholder.' into 4 of 5 conversations" in found.evidence
    assert found.rows == tuple(("data", i) for i in range(4))


def test_a_system_prompt_for_the_few_rows_without_one():
    rows = [*map(with_system, range(60)), *sound(3)]
    assert "into 3 of 63 conversations" in warnings(rows, HEADED)["template_adds_text"].evidence
    assert warnings(rows) == {}


def test_all_that_a_template_adds_is_one_warning():
    twice = HEADED + "{{ '<|im_start|>system\nRemember to be kind always.<|im_end|>' }}"
    found = warnings(sound(), twice, max_length=2048)["template_adds_text"]
    assert "'You are Quill" in found.evidence and "'Remember to be kind always.' into 4 of 4" in found.evidence


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "glm4moe"])
def test_sound_tool_calls_of_a_template_that_prints_tools(name):
    template = corpus.template(name)
    stops = corpus.byte_tokenizer(template).convert_tokens_to_ids(["<|user|>", "<|observation|>"])  # GLM's
    found = warnings([calling(i) for i in range(4)], template, max_length=4096, stops=stops)
    explained = found.pop("template_explains_tools")
    assert explained.severity == "info" and "You may call one or more functions" in explained.evidence
    assert "into 4 of 4 conversations with tools" in explained.evidence
    found.pop("no_stop_token", None)  # GLM prints none after the last turn
    expected = {"template_adds_text"} if name == "qwen2_5" else set()  # its system prompt, which tools do not bring
    assert found.keys() == expected


def test_tools_that_the_template_never_prints():
    rows = [{**chat(f"q{i}", "a"), "tools": corpus.TOOLS} for i in range(3)]
    found = warnings([*rows, *sound()], corpus.CHATML)["tools_not_shown"]
    assert found.rows == tuple(("data", i) for i in range(3)) and found.severity == "warning"
    assert found.evidence.startswith("3 of 3 conversations with tools are rendered without them")
    told = {"role": "system", "content": "You have get_weather(city)."}
    said = [{**row, "messages": [told, *row["messages"]]} for row in rows]
    assert "tools_not_shown" not in warnings(said, corpus.CHATML)


def test_a_date_in_the_template():
    found = warnings(sound(), DATED)
    assert len(found["date_in_template"].rows) == 4 and "Today is" in found["template_adds_text"].evidence
    fixed = warnings(sound(), DATED, template_kwargs={"date_string": "26 Jul 2024"})
    assert "date_in_template" not in fixed and "26 Jul 2024" in fixed["template_adds_text"].evidence
