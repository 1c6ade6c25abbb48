"""The prompt of a preference row: where TRL splits two texts, and said once where both sides repeat it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from trl.data_utils import extract_prompt

from hf_objectives.labels.pair_prompt import join_prompt, split_texts
from tests.support.preference_rows import CHOSEN, PROMPT, REJECTED, SYSTEM, TURNS


@given(st.text("ab ", min_size=1, max_size=6), st.text("ab ", min_size=1, max_size=6), st.text("ab ", max_size=6))
def test_texts_are_split_where_trl_splits_them(chosen, rejected, prompt):
    chosen, rejected = prompt + chosen, prompt + rejected
    at = split_texts(chosen, rejected)
    assert chosen[:at] == rejected[:at] and at < len(chosen) and at < len(rejected)
    if chosen[0] == rejected[0]:  # TRL looks at the last letter of all where the first differs
        assert extract_prompt({"chosen": chosen, "rejected": rejected})["prompt"] == chosen[:at]


def test_a_prompt_that_the_sides_repeat_is_said_once():
    head, answers = join_prompt([*TURNS], [[SYSTEM, *TURNS, *CHOSEN], [SYSTEM, *TURNS, *REJECTED]])
    assert [turn["content"] for turn in head] == ["Be brief.", "Hi", "Hello!", "What is 2+2?"]
    assert head[2]["train"] is False and answers == [CHOSEN, REJECTED]
    head, answers = join_prompt([SYSTEM, *PROMPT], [PROMPT + CHOSEN, PROMPT + REJECTED])
    assert head == [SYSTEM, *PROMPT] and answers == [CHOSEN, REJECTED]
    head, answers = join_prompt([SYSTEM], [PROMPT + CHOSEN, PROMPT + REJECTED])  # a prompt that the sides go on from
    assert head == [SYSTEM] and answers == [PROMPT + CHOSEN, PROMPT + REJECTED]
