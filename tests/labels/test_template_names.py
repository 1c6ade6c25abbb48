"""Which names of a template may hold a text or a message, from small templates read by hand."""

from __future__ import annotations

import jinja2
import pytest
from jinja2 import nodes

from hf_objectives.labels.template_names import Names, constant, is_split

LOOP = "{% for message in messages %}"


def names(body: str, given: frozenset[str] = frozenset()) -> Names:
    return Names(jinja2.Environment().parse(LOOP + body + "{% endfor %}"), "content", given)


def test_names_that_hold_a_text_are_followed_through_assignments_macros_and_namespaces():
    found = names(
        "{% set ns = namespace(last='') %}{% set text = message.content | trim %}{% set ns.last = text %}"
        "{% macro show(x) %}{{ x }}{% endmacro %}{{ show(ns.last) }}{% set role = message.role %}"
    )
    assert {"text", "show", "x"} <= found.texts and "role" not in found.texts
    assert "last" in found.keys
    assert "message" in found.items and "messages" not in found.items


@pytest.mark.parametrize(
    ("test", "outcome"),
    [
        ("message.tool_calls", False),  # a plain message has none
        ("message.get('tool_calls')", False),
        ("not message.tool_calls", True),
        ("message.content is string", True),
        ("message.tool_calls is defined", False),
        ("message.role == 'user'", None),
        ("message.tool_calls or message.role == 'user'", None),
        ("message.tool_calls and message.role == 'user'", False),
        ("other.tool_calls", None),  # nobody knows what `other` is
        ("message.items", None),  # a method of a mapping, not a key
    ],
)
def test_what_a_test_says_of_plain_messages(test, outcome):
    found = names("{% if " + test + " %}{% endif %}")
    (branch,) = found.tree.find_all(nodes.If)
    assert found.outcome(branch.test) is outcome


def test_a_branch_that_plain_messages_do_not_take_is_not_reached():
    found = names("{% if message.tool_calls %}{{ hidden }}{% else %}{{ shown }}{% endif %}")
    reached = {node.name for node in found.reached(found.tree) if isinstance(node, nodes.Name)}
    assert "shown" in reached and "hidden" not in reached


def test_a_given_variable_is_never_surely_a_message():
    body = "{% set item = message %}{% if item.tool_calls %}{% endif %}"
    for given, outcome in ((frozenset(), False), (frozenset({"item"}), None)):
        found = names(body, given)
        (branch,) = found.tree.find_all(nodes.If)
        assert found.outcome(branch.test) is outcome


def test_constants_and_splits():
    tree = jinja2.Environment().parse("{{ 'a'.split('b') }}{{ c }}")
    (call,) = tree.find_all(nodes.Call)
    assert is_split(call) and not is_split(call.node)
    assert constant(call.args[0]) == "b" and constant(call) is None
