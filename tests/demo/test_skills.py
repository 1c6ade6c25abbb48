"""Right answers are right by other means, and wrong ones are wrong."""

from __future__ import annotations

import calendar
import random
import re

import pytest

from hf_objectives import demo

PER_UNIT = {
    ("minutes", "hours"): 60, ("seconds", "minutes"): 60, ("hours", "days"): 24, ("days", "weeks"): 7,
    ("months", "years"): 12, ("centimetres", "metres"): 100, ("grams", "kilograms"): 1000,
    ("millimetres", "centimetres"): 10,
}  # fmt: skip


def solve(question: str) -> str:
    """The answer, from the question's words alone."""
    numbers = [int(n) for n in re.findall(r"\d+", question)]
    if found := re.search(r"(\d+) (minus|times) (\d+)", question):
        a, word, b = int(found[1]), found[2], int(found[3])
        return str({"minus": a - b, "times": a * b}[word])
    if found := re.search(r"(\d+) plus (\d+)", question):
        return written_sum(found[1], found[2])
    if question.startswith("Sort"):
        return "".join(sorted(question[5:-1]))
    if question.startswith("Reverse"):
        return "".join(reversed(question[8:-1]))
    if "larger" in question or "smaller" in question:
        return str((max if "larger" in question else min)(numbers))
    if found := re.search(r"Count (\w+) in (.*)\.", question):
        listed = [thing for thing in found[2].split() if thing == found[1]]
        return " ".join([*listed, str(len(listed))])
    if found := re.search(r"Which digit is (\w+) in (\d+)", question):
        return found[2][["first", "second", "third", "fourth", "fifth"].index(found[1])]
    if found := re.search(r"Prices: (.*)\. What is (\w+)\?", question):
        return dict(entry.split() for entry in found[1].split(", "))[found[2]]
    if found := re.search(r'Spell "(\w+)"', question):
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


def written_sum(a: str, b: str) -> str:
    """A sum as it is written on paper: from the last digits on, a carry as a third summand."""
    steps, carry = [], ""
    for x, y in zip(reversed(a), reversed(b), strict=True):
        terms = f"{x}+{y}{carry}"
        total = sum(map(int, terms.split("+")))
        steps.append(f"{terms}={total}")
        carry = "+1" if total > 9 else ""
    return " ".join([*steps, str(int(a) + int(b))])


def test_a_written_sum():
    assert written_sum("357", "199") == "7+9=16 5+9+1=15 3+1+1=5 556"


@pytest.mark.parametrize("skill", demo.SKILLS)
def test_right_answers_are_right_and_wrong_ones_wrong(skill):
    for question in demo.questions(200, skills=[skill]):
        assert solve(question.question) == question.answer != question.wrong, question
        assert style(question.answer) == style(question.wrong), question


def style(answer: str) -> set[str]:
    """The kinds of characters in an answer."""
    return set(re.sub(r"\d", "0", re.sub(r"[a-zA-Z]", "a", answer)))


@pytest.mark.parametrize("skill", [name for name in demo.SKILLS if name not in demo.FACTS])
def test_skills_have_ten_thousand_questions_and_facts_few(skill):
    rng = random.Random(0)
    assert len({demo.SKILLS[skill](rng).question for _ in range(60_000)}) > 10_000


def test_facts_are_told_in_other_words():
    for skill in demo.FACTS:
        for question in demo.questions(50, skills=[skill]):
            assert question.answer in question.fact and question.question not in question.fact
