"""Right answers are right by other means, and wrong ones are wrong."""

from __future__ import annotations

import calendar
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
