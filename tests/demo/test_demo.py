"""The built-in corpus: right answers are right by other means, wrong ones are wrong, and splits share no question."""

from __future__ import annotations

import calendar
import hashlib
import json
import re

import pytest
import torch

from hf_objectives import demo
from hf_objectives.demo.accuracy import exact_match
from hf_objectives.errors import ConfigError
from hf_objectives.labels.rows import encode_row

PER_UNIT = {
    ("minutes", "hours"): 60, ("seconds", "minutes"): 60, ("hours", "days"): 24, ("days", "weeks"): 7,
    ("months", "years"): 12, ("centimetres", "metres"): 100, ("grams", "kilograms"): 1000,
    ("millimetres", "centimetres"): 10,
}  # fmt: skip


def solve(question: str) -> str:
    """The answer, from the question's words alone."""
    numbers = [int(n) for n in re.findall(r"\d+", question)]
    if found := re.search(r"(\d+) (plus|minus|times) (\d+)", question):
        a, word, b = int(found[1]), found[2], int(found[3])
        return str({"plus": a + b, "minus": a - b, "times": a * b}[word])
    if question.startswith("Sort"):
        return " ".join(sorted(question[5:-1].split()))
    if "larger" in question or "smaller" in question:
        return str((max if "larger" in question else min)(numbers))
    if found := re.search(r"How often is (\w+) in (.*)\?", question):
        return str(found[2].split().count(found[1]))
    if found := re.search(r"Prices: (.*)\. What does (\w+) cost", question):
        return dict(entry.split() for entry in found[1].split(", "))[found[2]]
    if found := re.search(r"(?:Spell|Letters of|How is) (\w+)", question):
        letters = list(found[1])
        return " ".join(reversed(letters) if "backwards" in question else letters)
    for names in (list(calendar.day_name), list(calendar.month_name)[1:]):
        if found := re.search(rf"(\d+) (?:\w+ )?(after|before) ({'|'.join(names)})", question):
            step = int(found[1]) * (1 if found[2] == "after" else -1)
            return names[(names.index(found[3]) + step) % len(names)]
    for (small, large), factor in PER_UNIT.items():
        if re.search(rf"\b{small}\b", question) and re.search(rf"\b{large}\b", question):
            return str(numbers[0] * factor)
    raise AssertionError(question)


@pytest.mark.parametrize("skill", demo.SKILLS)
def test_right_answers_are_right_and_wrong_ones_wrong(skill):
    for question in demo.questions(200, skills=[skill]):
        assert solve(question.question) == question.answer != question.wrong, question


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


def test_tokenizer_and_model():
    tokenizer = demo.build_tokenizer()
    text = "What is 12 plus 7? naïve 日本"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer("1234")["input_ids"]) == 4
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    a, b = demo.build_model(tokenizer), demo.build_model(tokenizer)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert 5e5 < sum(p.numel() for p in a.parameters()) < 2e6
    for row in demo.chats(30):
        encoded = encode_row(tokenizer, row)
        trained = tokenizer.decode([label for label in encoded["labels"] if label != -100])
        expected = "".join(
            "<tool_call>calculator "
            + json.dumps(m["tool_calls"][0]["function"]["arguments"])
            + "</tool_call><|im_end|>"
            if m.get("tool_calls")
            else m["content"] + "<|im_end|>"
            for m in row["messages"]
            if m["role"] == "assistant"
        )
        assert trained == expected


def test_exact_match_counts_letters():
    tokenizer = demo.build_tokenizer()
    model = demo.build_model(tokenizer)
    asked = demo.questions(5, split="test", skills=["sorting"])
    share, answers = exact_match(model, tokenizer, asked, max_new_tokens=2)
    assert share == 0 and [question for question, _ in answers] == asked


def test_write(tmp_path):
    folder = demo.write(tmp_path, n=20, n_test=5)
    lines = (folder / "chats_test.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == demo.chats(5, split="test")
    assert len(list(folder.iterdir())) == 6


def test_bad_arguments_are_named():
    with pytest.raises(ConfigError, match="did you mean 'sorting'"):
        demo.questions(1, skills=["sortin"])
    with pytest.raises(ConfigError, match="expected 'train' or 'test'"):
        demo.questions(1, split="dev")
    with pytest.raises(ConfigError, match="did you mean 'sorting'"):
        demo.texts(1, skills=["sortin"])
    with pytest.raises(ConfigError, match="expected 'train' or 'test'"):
        demo.texts(1, split="dev")
