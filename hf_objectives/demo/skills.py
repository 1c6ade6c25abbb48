"""Skills: seeded generators of questions with a right answer and a nearly right one in the same style.

Each skill has more than 10,000 distinct questions, but for the two of facts (`FACTS`), whose answers stand in the texts.
`HARD` is beyond a tiny model in minutes, and is here to be seen failing.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

NAMES = (
    "apple bread chair dream eagle flame grape house juice knife lemon mango night ocean piano queen river stone table water"
).split()
PLACES = ("first", "second", "third", "fourth", "fifth")
ANIMALS = ("cat", "dog", "hen", "pig")
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
        wrong: an answer of the same style that is nearly right.
        expression: what a calculator is asked, for the skill that uses one.
        fact: how a text tells the answer, for skills of facts.
    """

    skill: str
    question: str
    answer: str
    wrong: str
    expression: str = ""
    fact: str = ""


def _near(rng: random.Random, value: int) -> str:
    """A number close to `value`, not negative and not equal to it."""
    return str(value + rng.choice([1, 2, 10] if value < 2 else [-1, 1, -2, 2] if value < 10 else [-1, 1, -10, 10]))


def _last_two_swapped(text: str) -> str:
    return text[:-2] + text[-1] + text[-2]


def sorting(rng: random.Random) -> Question:
    """Five digits in order."""
    digits = "".join(map(str, rng.sample(range(10), 5)))
    right = "".join(sorted(digits))
    return Question("sorting", f"Sort {digits}.", right, _last_two_swapped(right))


def reversing(rng: random.Random) -> Question:
    """Five digits backwards."""
    digits = "".join(map(str, rng.sample(range(10), 5)))
    return Question("reversing", f"Reverse {digits}.", digits[::-1], _last_two_swapped(digits[::-1]))


def _word(rng: random.Random) -> str:
    """An invented word of three syllables."""
    return "".join(rng.choice("bdfgkpvz") + rng.choice("aeiou") for _ in range(3))


def spelling(rng: random.Random) -> Question:
    """Letters of an invented word."""
    word = _word(rng)
    return Question("spelling", f'Spell "{word}".', " ".join(word), " ".join(_last_two_swapped(word)))


def backwards(rng: random.Random) -> Question:
    """Letters of an invented word, from its end."""
    word = _word(rng)
    right = word[::-1]
    return Question("backwards", f'Spell "{word}" backwards.', " ".join(right), " ".join(_last_two_swapped(right)))


def counting(rng: random.Random) -> Question:
    """How many of one thing are in a list, by writing them down."""
    things = rng.choices(ANIMALS, k=rng.randint(4, 6))
    thing = rng.choice(things)
    n = things.count(thing)
    miscounted = n + rng.choice((-1, 1)) if n > 1 else n + 1
    right, wrong = (" ".join([thing] * k + [str(k)]) for k in (n, miscounted))
    return Question("counting", f"Count {thing} in {' '.join(things)}.", right, wrong)


def picking(rng: random.Random) -> Question:
    """The digit at a place."""
    digits = "".join(map(str, rng.sample(range(10), 5)))
    i = rng.randrange(5)
    return Question("picking", f"Which digit is {PLACES[i]} in {digits}?", digits[i], digits[i - 1])


def comparison(rng: random.Random) -> Question:
    """The larger or smaller of two numbers."""
    a, b = rng.sample(range(10, 100), 2)
    word, pick = rng.choice((("larger", max), ("smaller", min)))
    right = pick(a, b)
    return Question("comparison", f"Which is {word}, {a} or {b}?", str(right), str(a + b - right))


def lookup(rng: random.Random) -> Question:
    """A value from a table in the question."""
    names = rng.sample(NAMES, 3)
    values = rng.sample(range(1, 10), 3)
    i = rng.randrange(3)
    table = ", ".join(f"{name} {value}" for name, value in zip(names, values, strict=True))
    return Question("lookup", f"Prices: {table}. What is {names[i]}?", str(values[i]), str(values[(i + 1) % 3]))


def addition(rng: random.Random) -> Question:
    """A sum with its written steps, ones first; the wrong one forgets a carry, or has one too many."""
    a, b = rng.randint(100, 999), rng.randint(100, 999)
    carried = [place for place in (1, 2) if a % 10**place + b % 10**place >= 10**place]
    slip = rng.choice(carried or [1])
    return Question("addition", f"What is {a} plus {b}?", _written(a, b), _written(a, b, slip=slip))


def _written(a: int, b: int, *, slip: int | None = None) -> str:
    """The written sum of two numbers of three digits; at the place `slip` the carry is the other one."""
    steps, digits, carry = [], "", 0
    for place in range(3):
        carry = 1 - carry if place == slip else carry
        x, y = a // 10**place % 10, b // 10**place % 10
        total = x + y + carry
        steps.append(f"{x}+{y}{'+1' if carry else ''}={total}")
        digits, carry = str(total % 10) + digits, total // 10
    return f"{' '.join(steps)} {carry or ''}{digits}"


def subtraction(rng: random.Random) -> Question:
    """A difference, at once and without steps."""
    b, a = sorted(rng.sample(range(100, 1000), 2))
    return Question("subtraction", f"What is {a} minus {b}?", str(a - b), _near(rng, a - b))


def conversion(rng: random.Random) -> Question:
    """Units of time, length and weight."""
    small, large, factor = rng.choice(UNITS)
    n = rng.randint(1, 10)
    asked = rng.choice(
        (f"How many {small} are {n} {large}?", f"{n} {large} in {small}?", f"Turn {n} {large} into {small}.")
    )
    right = str(n * factor)
    return Question(
        "conversion", asked, right, _near(rng, n * factor), fact=f"{n} {large} are as many {small}:\n{right}"
    )


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
    return Question("dates", asked, right, wrong, fact=f"{n} {unit}s {word} {names[i]} comes:\n{right}")


def multiplication(rng: random.Random) -> Question:
    """Products that are left to a calculator."""
    a, b = rng.randint(11, 999), rng.randint(11, 99)
    return Question("multiplication", f"What is {a} times {b}?", str(a * b), _near(rng, a * b), f"{a}*{b}")


#: The skills, by name; only multiplication calls a tool.
SKILLS: dict[str, Callable[[random.Random], Question]] = {
    f.__name__: f
    for f in (
        *(sorting, reversing, picking, spelling, backwards, counting, comparison, addition, multiplication),
        *(lookup, subtraction),
        *(conversion, dates),
    )
}
#: Skills with few questions, whose answers stand in the texts.
FACTS = ("conversion", "dates")
#: Skills that a tiny model does not learn in minutes.
HARD = ("lookup", "subtraction")
