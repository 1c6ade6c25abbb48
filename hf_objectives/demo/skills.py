"""Skills: seeded generators of questions with a right and a subtly wrong answer."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

WORDS = (
    "apple bread chair dream eagle flame grape house juice knife lemon mango night ocean piano queen river stone table water"
).split()
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
UNITS = (
    ("minutes", "hours", 60),
    ("seconds", "minutes", 60),
    ("hours", "days", 24),
    ("days", "weeks", 7),
    ("months", "years", 12),
    ("centimetres", "metres", 100),
    ("grams", "kilograms", 1000),
    ("millimetres", "centimetres", 10),
)


@dataclass(frozen=True, slots=True)
class Question:
    """A question with its answers.

    Attributes:
        skill: name of the skill, a key of SKILLS.
        question: the question.
        answer: the right answer.
        wrong: an answer that is nearly right.
        expression: what a calculator is asked, for the skill that uses one.
    """

    skill: str
    question: str
    answer: str
    wrong: str
    expression: str = ""


def _near(rng: random.Random, value: int) -> str:
    """A number close to `value`, not negative and not equal to it."""
    return str(value + rng.choice([1, 2, 10] if value < 2 else [-1, 1, -2, 2] if value < 10 else [-1, 1, -10, 10]))


def arithmetic(rng: random.Random) -> Question:
    """Sums and differences of numbers up to twelve."""
    a, b = rng.randint(0, 12), rng.randint(0, 12)
    sign = rng.choice(("plus", "minus"))
    if sign == "minus":
        a, b = max(a, b), min(a, b)
    result = a + b if sign == "plus" else a - b
    asked = rng.choice((f"What is {a} {sign} {b}?", f"{a} {sign} {b} makes?", f"Compute {a} {sign} {b}."))
    return Question("arithmetic", asked, str(result), _near(rng, result))


def conversion(rng: random.Random) -> Question:
    """Units of time, length and weight."""
    small, large, factor = rng.choice(UNITS)
    n = rng.randint(1, 10)
    asked = rng.choice(
        (f"How many {small} are {n} {large}?", f"{n} {large} in {small}?", f"Turn {n} {large} into {small}.")
    )
    return Question("conversion", asked, str(n * factor), _near(rng, n * factor))


def dates(rng: random.Random) -> Question:
    """Days and months before and after."""
    names, unit = (DAYS, "day") if rng.random() < 0.5 else (MONTHS, "month")
    i, n = rng.randrange(len(names)), rng.randint(1, 4)
    sign = rng.choice((1, -1))
    word = "after" if sign > 0 else "before"
    right, wrong = names[(i + sign * n) % len(names)], names[(i + sign * (n + 1)) % len(names)]
    asked = rng.choice(
        (
            f"Which {unit} is {n} {word} {names[i]}?",
            f"{n} {unit}s {word} {names[i]}?",
            f"Name the {unit} {n} {word} {names[i]}.",
        )
    )
    return Question("dates", asked, right, wrong)


def sorting(rng: random.Random) -> Question:
    """Three digits in order."""
    digits = rng.sample(range(10), 3)
    ordered = sorted(digits)
    wrong = [ordered[1], ordered[0], ordered[2]]
    listed = " ".join(map(str, digits))
    return Question("sorting", f"Sort {listed}.", " ".join(map(str, ordered)), " ".join(map(str, wrong)))


def spelling(rng: random.Random) -> Question:
    """Letters of a word, forwards or backwards."""
    word = rng.choice(WORDS)
    way = rng.choice(("", " backwards"))
    asked = rng.choice((f"Spell {word}{way}.", f"Letters of {word}{way}?", f"How is {word} spelt{way}?"))
    right, wrong = word, word[:-2] + word[-1] + word[-2]
    if way:
        right, wrong = word[::-1], word
    return Question("spelling", asked, " ".join(right), " ".join(wrong))


def counting(rng: random.Random) -> Question:
    """How many of one thing are in a list."""
    things = rng.choices(("cat", "dog"), k=rng.randint(2, 6))
    thing = rng.choice(things)
    n = things.count(thing)
    return Question("counting", f"How often is {thing} in {' '.join(things)}?", str(n), str(n + 1))


def lookup(rng: random.Random) -> Question:
    """A value from a table in the question."""
    names = rng.sample(WORDS, 3)
    values = rng.sample(range(1, 100), 3)
    i = rng.randrange(3)
    table = ", ".join(f"{name} {value}" for name, value in zip(names, values, strict=True))
    question = f"Prices: {table}. What does {names[i]} cost?"
    return Question("lookup", question, str(values[i]), str(values[(i + 1) % 3]))


def comparison(rng: random.Random) -> Question:
    """The larger or smaller of two numbers."""
    a, b = rng.sample(range(30), 2)
    word, pick = rng.choice((("larger", max), ("smaller", min)))
    right = pick(a, b)
    return Question("comparison", f"Which is {word}, {a} or {b}?", str(right), str(a + b - right))


def multiplication(rng: random.Random) -> Question:
    """Products that are left to a calculator."""
    a, b = rng.randint(11, 99), rng.randint(11, 99)
    return Question("multiplication", f"What is {a} times {b}?", str(a * b), _near(rng, a * b), f"{a}*{b}")


#: The skills, by name; only multiplication calls a tool.
SKILLS: dict[str, Callable[[random.Random], Question]] = {
    f.__name__: f
    for f in (arithmetic, conversion, dates, sorting, spelling, counting, lookup, comparison, multiplication)
}
