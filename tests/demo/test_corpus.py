"""The built-in corpus: a function of its seed, whose splits share no question."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from hf_objectives import demo
from hf_objectives.errors import ConfigError


def test_the_corpus_is_a_function_of_its_seed():
    assert demo.chats(50) == demo.chats(50) != demo.chats(50, seed=1)
    assert demo.texts(20) == demo.texts(20)
    assert demo.preferences(20) == demo.preferences(20)


def test_texts_of_some_skills():
    rows = demo.texts(40, skills=["sorting", "lookup"])
    lines = [line for row in rows for line in row["text"].split("\n")]
    assert {line.split()[0] for line in lines[::2]} == {"Sort", "Prices:"}  # an answer has a line of its own
    assert rows == demo.texts(40, skills=["sorting", "lookup"]) != demo.texts(40, seed=1, skills=["sorting", "lookup"])


@pytest.mark.slow
def test_no_test_question_is_trained():
    def asked(split):
        rows = demo.chats(2000, split=split)
        return {m["content"] for row in rows for m in row["messages"] if m["role"] == "user"}

    train, test = asked("train"), asked("test")
    assert len(test) > 300 and not train & test


def test_an_exam_has_as_many_distinct_questions_of_every_skill():
    exam = demo.exam(20)
    asked = Counter(question.skill for question in exam)
    assert asked == dict.fromkeys(demo.SKILLS, 20) and len({question.question for question in exam}) == len(exam)
    assert len(demo.exam(100, skills=["conversion"])) < 100  # it has no more
    seen = {m["content"] for row in demo.chats(400, seed=3) for m in row["messages"] if m["role"] == "user"}
    assert {question.question for question in demo.exam(20, seed=3, split="train")} <= seen
    assert not {question.question for question in exam} & seen


def test_a_careless_annotator_is_wrong_in_the_skills_that_are_named():
    careful, careless = demo.chats(600), demo.chats(600, careless={"sorting": 0.75, "lookup": 0.0})
    same, wrong = 0, 0
    for a, b in zip(careful, careless, strict=True):
        asked = ""
        for m, n in zip(a["messages"], b["messages"], strict=True):
            if m["role"] == "user":
                asked = m["content"]
            if m["role"] == "assistant" and asked.startswith("Sort"):
                same, wrong = same + (m == n), wrong + (m != n)
            else:
                assert m == n
    assert 0.6 < wrong / (wrong + same) < 0.9
    with pytest.raises(ConfigError, match="did you mean 'sorting'"):
        demo.chats(1, careless={"sortin": 0.5})


def test_only_conversations_with_a_tool_have_a_system_message():
    for row in demo.chats(100):
        assert ("tools" in row) == (row["messages"][0]["role"] == "system") == (row["source"] == "tool")


def test_an_answer_has_the_same_tokens_in_texts_and_in_chats():
    tokenizer = demo.build_tokenizer()
    for question in demo.exam(3):
        if question.expression:
            continue
        text = tokenizer(question.fact or f"{question.question}\n{question.answer}")["input_ids"]
        messages = [{"role": "user", "content": question.question}, {"role": "assistant", "content": question.answer}]
        chat = tokenizer.apply_chat_template(messages, tokenize=False)
        alone = tokenizer(question.answer)["input_ids"]
        assert text[-len(alone) :] == alone
        assert tokenizer(chat)["input_ids"][-len(alone) - 2 : -2] == alone


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


def test_pairs_are_of_skills_that_can_be_worked_out():
    skills = {row["skill"] for row in demo.preferences(400)}
    assert skills == {*demo.SKILLS} - {*demo.HARD, *demo.FACTS, "multiplication"}


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
