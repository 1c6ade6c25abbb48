"""Which templates only print what messages say, and what they look for in it."""

from __future__ import annotations

import pytest

from hf_objectives.labels.text_use import searched_strings, text_use
from tests.support.chat_corpus import ORIGINALS, template

IN_LOOP = "{% set ns = namespace() %}{% for m in messages %}BODY{% endfor %}"
BLOCK_TEMPLATES = ("idefics3", "llava_next", "smolvlm")


@pytest.mark.parametrize(
    ("body", "searched"),
    [
        ("{{ m['content'] }}", set()),
        ("{{ '<' + m.role + '>' + m.content | trim + eos_token }}", set()),
        ("{% set c = m.content.strip() %}{{ c }}", set()),
        ("{% if m.content is string %}{{ m.content }}{% else %}{{ m.content[0].text[:3] }}{% endif %}", set()),
        ("{% generation %}{{ m.content }}{% endgeneration %}", set()),
        ("{{ 'a' if m.content else 'b' }}", set()),
        ("{{ m.content }}{% if m.tool_calls is defined %}{{ m.content[::-1] }}{% endif %}", set()),
        ("{% if m.content | length > 0 %}{{ m.content }}{% endif %}", set()),
        ("{% if '/no_think' in m.content %}x{% endif %}{{ m.content }}", {"/no_think"}),
        ("{% set c = m['content'] %}{% if c.startswith('a') %}x{% endif %}", {"a"}),
        ("{% set d = m.content + 'x' %}{% set c = d %}{% if c == 'ax' %}y{% endif %}", {"ax"}),
        ("{{ m.content.split('</think>')[-1] }}", {"</think>"}),
        ("{{ m.content | replace('a', 'b') }}", {"a"}),
        ("{% set ns.c = m.content %}{% if ns.c == 'a' %}x{% endif %}", {"a"}),
        ("{% macro p(x) %}{{ x.split('b')[0] }}{% endmacro %}{{ p(m.content) }}", {"b"}),
        ("{% macro p(x) %}{{ x }}{% endmacro %}{% if p(m.content) == 'q' %}x{% endif %}", {"q"}),
        ("{% set tag = 'e' %}{% if m.content.endswith(tag) %}x{% endif %}", {"e"}),
        ("{% generation %}{{ m.content[::-1] if m.content == 'a' }}{% endgeneration %}", None),
        ("{% macro show(x) %}{{ x }}{% endmacro %}{% call show('a') %}{{ m.content }}{% endcall %}", None),
        ("{{ m.content | length }}{% if m.content | length > 9 %}x{% endif %}", None),
        ("{% if m.content > 'a' %}x{% endif %}", None),
        ("{% if m.content in other %}x{% endif %}", None),
        ("{% for block in m.content %}{{ block }}{% endfor %}", None),
        ("{{ m.content.strip('x') }}", None),
        ("{{ m.content | lower }}", None),
        ("{{ m.content.upper() }}", None),
        ("{{ m.content * 2 }}", None),
        ("{{ m | tojson }}", None),
        ("{% for k, v in m.items() %}{{ v }}{% endfor %}", None),
        ("{% for k in range(m.content) %}x{% endfor %}", None),
        ("{{ m.content | length }}{{ m.content }}", None),
        ("{% set n = m.content | length %}{% if n > 5 %}x{% endif %}", None),
        ("{% if m.content | length is divisibleby 2 %}x{% endif %}", None),
        ("{% if 'Hi' is eq m.content %}x{% endif %}", None),
        ("{{ '%.3s' | format(m.content) }}", None),
        ("{% with x = m.content %}{{ x[:3] }}{% endwith %}", None),
        ("{% set x | truncate(30) %}{{ m.content }}{% endset %}{{ x }}", None),
        ("{% for key in ['content'] %}{{ m[key][:3] }}{% endfor %}", None),
        ("{% for tag in ['b', 'c'] %}{% if tag in m.content %}x{% endif %}{% endfor %}", None),
        ("{{ m.content.split(none)[0] }}", None),
        ("{{ m.content | trim(chars='ab') }}", None),
        ("{{ m.content | replace(old='a', new='b') }}", None),
        ("{% if m.content == n.content + '!' %}x{% endif %}", None),
        ("{% set m = {'flag': 1} %}{% if m.flag %}{{ messages[0].content[:3] }}{% endif %}", None),
        ("{% if m.items is defined %}{{ m.content[:3] }}{% endif %}", None),
        ("{% if m.get('flag', true) %}{{ m.content[:3] }}{% endif %}", None),
        ("{% if loop.changed(m) %}x{% endif %}", None),
        ("{{ (m ~ '') | length }}", None),
        ("{{ dict(a=m.content).a[:3] }}", None),
        ("{% macro f() %}{{ varargs[0][:3] }}{% endmacro %}{{ f(m.content) }}", None),
        ("{% set ns = namespace({'q': m.content}) %}{{ ns.q[:3] }}", None),
        ("{% set ns.l = m %}{{ ns.l | string }}", None),
        ("{% set ns.p = none %}{% if ns.p is string %}a{% else %}{{ m.content[:3] }}{% endif %}", None),
    ],
)
def test_text_use(body, searched):
    use = text_use(IN_LOOP.replace("BODY", body), "content")
    assert (set(use.searched) if use.known else None) == searched


def test_what_is_stripped_and_compared():
    assert text_use("{{ messages[0].content | trim }}", "content").strips
    use = text_use("{{ messages[0].content == messages[1].content }}", "content")
    assert use.compares and use.known and not use.strips


def test_a_variable_that_the_template_is_given_is_no_constant():
    source = "{% if not tag %}{% set tag = 'a' %}{% endif %}{% if tag in messages[0].content %}x{% endif %}"
    assert text_use(source, "content").searched == {"a"}
    assert not text_use(source, "content", frozenset({"tag"})).known


def test_dates():
    assert text_use("{{ strftime_now('%d %b %Y') }}", "content").dates == ("%d %b %Y",)


@pytest.mark.slow
def test_templates_of_which_more_is_to_be_known():
    """All others of TRL's print plain conversations as fixed text with the messages' texts in between."""
    keys = {name: "text" if name in BLOCK_TEMPLATES else "content" for name in ORIGINALS}
    unknown = {name for name, key in keys.items() if not text_use(template(name), key).known}
    assert unknown == {"lfm2_2_5_vl", "muse_glimmer"}


def test_searched_strings():
    assert searched_strings(
        "{% if 'tool_calls' in m or '/think' in m.content %}{{ x.split('<a>')[0] }}{% endif %}"
    ) == {
        "/think",
        "<a>",
    }
