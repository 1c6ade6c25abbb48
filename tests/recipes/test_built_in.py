"""The built-in corpus by its names, and the marks of an exam."""

from __future__ import annotations

import pytest

from hf_objectives import demo
from hf_objectives.errors import ConfigError
from hf_objectives.recipes.built_in import Marks, built_in_rows, is_built_in, is_right, pair_rows


def test_names():
    assert is_built_in("builtin") and is_built_in("builtin:texts") and not is_built_in("builtin.jsonl")
    with pytest.raises(
        ConfigError, match="no 'builtin:text'; the built-in corpus has builtin, builtin:careless, builtin:texts"
    ):
        is_built_in("builtin:text")
    assert built_in_rows("builtin", 5, seed=1) == demo.chats(5, seed=1)
    assert built_in_rows("builtin:texts", 5, split="test") == demo.texts(5, split="test")


def test_pairs_have_one_name():
    train, held_out = pair_rows("builtin", (20, 10), seed=1, skills=["dates"])
    assert [row["row"] for row in train] == [*range(20)] and {row["skill"] for row in train + held_out} == {"dates"}
    with pytest.raises(ConfigError, match="'builtin:careless', which has no pairs and no prompts of its own"):
        pair_rows("builtin:careless", (1, 1), seed=0)


def test_an_annotator_is_careless_in_training_alone():
    assert built_in_rows("builtin:careless", 50) == demo.chats(50, careless=demo.CARELESS) != demo.chats(50)
    assert built_in_rows("builtin:careless", 50, split="test") == demo.chats(50, split="test")


def question(skill: str, expression: str = "") -> demo.Question:
    return demo.Question(skill, "?", "12", "21", expression)


def test_marks():
    call = '<tool_call>calculator {"expression": "3*4"}</tool_call>'
    unseen = [(question("sorting"), "12"), (question("sorting"), "21"), (question("dates"), "12")]
    unseen += [(question("multiplication", "3*4"), call), (question("multiplication", "3*4"), "12")]
    marks = Marks(unseen, [(question(skill), "12") for skill in ("sorting", "dates", "multiplication")])
    assert [is_right(*answer) for answer in unseen] == [True, False, True, True, False]
    figures = marks.figures()
    assert figures["exact_match"] == 0.5 and figures["exact_match_facts"] == 1 and figures["exact_match_trained"] == 1
    assert "exact_match_trained" not in Marks(unseen).figures() and "trained" not in Marks(unseen).by_skill()["sorting"]
    # Wilson's interval of 2 in 4 by its formula: (0.5 + z2/8 +- z sqrt(1/16 + z2/64)) / (1 + z2/4), z2 = 3.8415
    assert figures["exact_match_low"] == pytest.approx(0.1500, abs=1e-4)
    assert figures["exact_match_high"] == pytest.approx(0.8500, abs=1e-4)
    skills = marks.by_skill()
    assert skills["sorting"]["exact_match"] == 0.5 and skills["sorting"]["num_questions"] == 2
    assert list(skills) == ["sorting", "dates", "multiplication"]
