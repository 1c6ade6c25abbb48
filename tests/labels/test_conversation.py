"""Turns that are not checked yet."""

from __future__ import annotations

from hf_objectives.labels.conversation import common_turns, num_leading, role_of, show

ASK, FOUR = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}


def test_what_is_no_message_has_no_role():
    assert role_of(ASK) == "user" and role_of("text") is None and role_of({}) is None
    assert show(ASK) == "user '2+2?'" and show("text") == "None 'text'"


def test_system_and_developer_messages_lead():
    leading = [{"role": "system"}, {"role": "developer"}]
    assert num_leading([*leading, ASK, *leading]) == 2 and num_leading(leading) == 2 and num_leading(["text"]) == 0


def test_turns_are_common_whatever_they_say_about_training():
    assert common_turns([ASK, FOUR], [{**ASK, "weight": 0, "name": None}, {**FOUR, "train": False}]) == 2
    assert common_turns([ASK, FOUR], [ASK, {**FOUR, "content": "5"}]) == 1
    assert common_turns(["a"], ["a", ASK]) == 1
