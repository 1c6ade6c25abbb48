"""The built-in corpus: a function of its seed, whose splits share no question."""

from __future__ import annotations

import hashlib
import json

import pytest

from hf_objectives import demo
from hf_objectives.errors import ConfigError


def test_the_corpus_is_a_function_of_its_seed():
    assert demo.chats(50) == demo.chats(50) != demo.chats(50, seed=1)
    assert demo.texts(20) == demo.texts(20)
    assert demo.preferences(20) == demo.preferences(20)


def test_texts_of_all_skills_are_what_they_were():
    def digest(rows):
        return hashlib.sha256(repr(rows).encode()).hexdigest()[:16]

    # Recorded before texts of some skills could be asked for; quickstarts and their figures rest on these.
    assert digest(demo.texts(500)) == "730dc46f25ea16f7"
    assert digest(demo.texts(300, seed=3, split="test")) == "d8316728f7c4e919"


def test_texts_of_some_skills():
    rows = demo.texts(40, skills=["sorting", "lookup"])
    lines = [line for row in rows for line in row["text"].split("\n")]
    assert {line.split()[0] for line in lines} == {"Sort", "Prices:"}
    assert rows == demo.texts(40, skills=["sorting", "lookup"]) != demo.texts(40, seed=1, skills=["sorting", "lookup"])


@pytest.mark.slow
def test_no_test_question_is_trained():
    def asked(split):
        rows = demo.chats(2000, split=split)
        return {m["content"] for row in rows for m in row["messages"] if m["role"] == "user"}

    train, test = asked("train"), asked("test")
    assert len(test) > 300 and not train & test


def test_chats_call_the_calculator():
    rows = [row for row in demo.chats(50) if row["source"] == "tool"]
    calls = [(m, row["messages"][i + 1]) for row in rows for i, m in enumerate(row["messages"]) if m.get("tool_calls")]
    assert calls
    for message, result in calls:
        a, b = message["tool_calls"][0]["function"]["arguments"]["expression"].split("*")
        assert result["role"] == "tool" and result["content"] == str(int(a) * int(b))


def test_preferences_and_reward():
    rows = demo.preferences(30)
    answers = [row["answer"] for row in rows]
    prompts = [row["prompt"] for row in rows]
    assert demo.answer_reward(prompts, [row["chosen"] for row in rows], answers) == [1.0] * 30
    assert demo.answer_reward(prompts, [row["rejected"] for row in rows], answer=answers) == [0.0] * 30
    assert demo.answer_reward(prompts[:1], [f" {answers[0]} "], answers[:1]) == [1.0]


def test_write(tmp_path):
    folder = demo.write(tmp_path, n=20, n_test=5)
    lines = (folder / "chats_test.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == demo.chats(5, split="test")
    assert len(list(folder.iterdir())) == 6


def test_bad_arguments_are_named():
    with pytest.raises(ConfigError, match="did you mean 'sorting'"):
        demo.questions(1, skills=["sortin"])
    with pytest.raises(ConfigError, match="expected one of train, test"):
        demo.questions(1, split="dev")
    with pytest.raises(ConfigError, match="did you mean 'sorting'"):
        demo.texts(1, skills=["sortin"])
    with pytest.raises(ConfigError, match="expected one of train, test"):
        demo.texts(1, split="dev")
