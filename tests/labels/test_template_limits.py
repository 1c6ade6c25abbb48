"""A chat template of a stranger renders, or ends in a TemplateError, in bounded time and memory."""

# ruff: noqa: E501 (a template is one line)

from __future__ import annotations

import resource
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest

from hf_objectives.errors import TemplateError
from hf_objectives.labels import template_budget
from hf_objectives.labels.chat import encode_chat
from hf_objectives.labels.templates import Renderer, compile_template
from tests.support.chat_corpus import PLAIN, byte_tokenizer


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    """The limits, much narrower, so that they are reached soon."""
    monkeypatch.setattr(template_budget, "MAX_STEPS", 300_000)
    monkeypatch.setattr(template_budget, "MAX_TEXT", 1 << 21)


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(autouse=True)
def little_memory():
    """Two gigabytes more than there is now: a template that would take the machine's memory gets a MemoryError, not the
    machine."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (2 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


DOUBLED = "{% set n = namespace(x=START) %}{% for i in range(60) %}{% set n.x = STEP %}{% endfor %}"


def doubled(start: str, step: str, end: str = "") -> str:
    """A template that takes a step sixty times."""
    return DOUBLED.replace("START", start).replace("STEP", step) + end


LOOPS = {
    "nested": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "nested_short": "{% for a in 'x' * 60 %}" * 9 + "{% endfor %}" * 9,
    "filtered": "{% for a in range(99999) %}{{ range(99999) | select('gt', 9999999) | list }}{% endfor %}",
    "mapped": "{% for a in range(99999) %}{{ range(99999) | map('string') | sum(start='') }}{% endfor %}",
    "lists": "{% set n = namespace(x=[]) %}{% for a in range(99999) %}{% set n.x = n.x + [range(99999) | list] %}{% endfor %}",
    "macro_tree": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "caller": "{% macro f() %}{{ caller() }}{{ caller() }}{% endmacro %}"
    + "{% call f() %}" * 60 + "x" + "{% endcall %}" * 60,
    "block": "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
    "recursive": "{% for a in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "recursive_long": "{% for a in [1, 2] recursive %}{{ loop(range(99999)) }}{% endfor %}",
    "lipsum": "{{ lipsum(n=99999999) }}",
    "long_comparisons": "{% set s = 'x' * 2000000 %}{% for i in range(99999) %}{{ s[1:] == s }}{% endfor %}",
}  # fmt: skip
TEXTS = {
    "times": "{{ 'x' * 10**10 }}",
    "times_left": "{{ 10000000000 * 'x' }}",
    "times_list": "{{ ['x'] * 10000000000 }}",
    "times_times": "{{ 'x' * 2000000 * 2000000 }}",
    "variable": "{{ messages[0].role * 9999999999 }}",
    "plus": doubled("'x'", "n.x + n.x"),
    "plus_written": doubled("'x'", "n.x + n.x", "{{ n.x + n.x + n.x }}"),
    "tilde": doubled("'x'", "n.x ~ n.x"),
    "with": "{% set s = 'x' * 999999 %}" + "".join("{% with s = s + s %}" for _ in range(60)) + "{% endwith %}" * 60,
    "argument": "{% macro f(s, n) %}{% if n %}{{ f(s + s, n - 1) }}{% endif %}{% endmacro %}{{ f('xxxx', 60) }}",
    "block_set": "{% set n = namespace(x='x') %}{% for i in range(60) %}{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}{% endfor %}",
    "buffered": "{% set s = 'x' * 999999 %}{% set x %}{% for i in range(99999) %}{{ s + s }}{% endfor %}{% endset %}",
    "buffered_upper": "{% set s = 'x' * 999999 %}{% set x %}{% for i in range(99999) %}{{ s | upper }}{% endfor %}{% endset %}",
    "written": "{% for a in range(9999) %}{{ 'x' * 9999 }}{% endfor %}",
    "wide_plus": "{% set s = 'x' * 999999 %}{{ " + " + ".join(["s"] * 2000) + " }}",
    "wide_tilde": "{% set s = 'x' * 999999 %}{{ " + " ~ ".join(["s"] * 2000) + " }}",
    "percent": "{{ '%10000000000d' % 1 }}",
    "percent_star": "{{ '%*d' % (10000000000, 1) }}",
    "percent_many": "{{ ('%s' * 100000) % ((['x' * 99999] * 100000) | list) }}",
    "percent_names": "{{ ('%(a)s' * 99999) % {'a': 'x' * 99999} }}",
    "format_filter": "{{ '%10000000000d' | format(1) }}",
    "format": "{{ '{:10000000000}'.format(1) }}",
    "format_nested": "{{ '{:{}}'.format(1, 10000000000) }}",
    "format_many": "{{ ('{0}' * 99999).format('x' * 99999) }}",
    "format_map": "{{ ('{a}' * 99999).format_map({'a': 'x' * 99999}) }}",
    "center": "{{ 'x' | center(10000000000) }}",
    "center_method": "{{ 'x'.center(10000000000) }}",
    "ljust": "{{ 'x'.ljust(10000000000) }}",
    "zfill": "{{ 'x'.zfill(10000000000) }}",
    "expandtabs": "{{ ('\\t' * 999999).expandtabs(9999) }}",
    "indent": "{{ ('\\n' * 999999) | indent(9999, first=true, blank=true) }}",
    "replace": "{{ ('x' * 999999) | replace('x', 'y' * 999999) }}",
    "replace_method": "{{ ('x' * 999999).replace('', 'y' * 999999) }}",
    "join": "{{ (['x' * 999999] * 99999) | join }}",
    "join_separator": "{{ ('x' * 99999) | join('y' * 99999) }}",
    "join_method": "{{ ('y' * 99999).join(['x'] * 99999) }}",
    "join_generator": "{{ range(99999) | map('string') | join('y' * 99999) }}",
    "translate": "{{ ('x' * 999999).translate({120: 'y' * 999999}) }}",
    "to_bytes": "{{ (1).to_bytes(10000000000, 'big') }}",
    "tojson_indent": "{{ messages | tojson(indent=9999999999) }}",
    "tojson_separator": "{{ range(99999) | list | tojson(separators=('x' * 99999, ':')) }}",
    "batch": "{{ [1] | batch(9999999999, 0) | list }}",
    "slice": "{{ [1] | slice(9999999999) | list }}",
    "shared_printed": doubled("[1]", "[n.x, n.x]", "{{ n.x }}"),
    "shared_string": doubled("[1]", "[n.x, n.x]", "{{ n.x | string }}"),
    "shared_tojson": doubled("[1]", "[n.x, n.x]", "{{ n.x | tojson }}"),
    "shared_tilde": doubled("[1]", "[n.x, n.x]", "{{ n.x ~ 'x' }}"),
    "shared_percent": doubled("[1]", "[n.x, n.x]", "{{ '%s' % (n.x,) }}"),
    "shared_format": doubled("[1]", "[n.x, n.x]", "{{ '{}'.format(n.x) }}"),
    "shared_compared": doubled("[1]", "[n.x, n.x]", doubled("[1]", "[n.x, n.x]", "").replace("n.", "m.").replace(" n ", " m ")
                               + "{{ n.x == m.x }}"),
    "shared_in": doubled("[1]", "[n.x, n.x]", "{{ n.x in [[1], n.x] }}"),
    "shared_sort": doubled("[1]", "[n.x, n.x]", "{{ [n.x, n.x] | sort }}"),
    "shared_dict": doubled("{}", "{'a': n.x, 'b': n.x}", "{{ n.x }}"),
    "shared_select": doubled("[1]", "[n.x, n.x]", "{{ [n.x] | select('eq', n.x) | list }}"),
}  # fmt: skip
NUMBERS = {
    "zero": "{{ 1 / 0 }}",
    "overflow": "{{ 10.0 ** 999 }}",
    "range": "{{ range(10 ** 9) }}",
    "power": "{{ 10 ** (10 ** 10) }}",
    "power_variable": "{% for n in [9] %}{{ n ** (n ** (n ** n)) }}{% endfor %}",
    "square": doubled("9999", "n.x * n.x"),
    "sum": "{% set n = namespace(x=3) %}{% for i in range(99999) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "round": "{{ 1 | round(999999999, 'ceil') }}",
    "float_to_int": "{{ (10.0 ** 308 * 10) | int }}",
    "digits": "{{ 10 ** 5000 }}",
    "literal": "{{ " + "9" * 5000 + " }}",
    "unpack": "{% for a, b in [1] %}{% endfor %}",
    "missing_key": "{{ {}['x'].y.z }}",
    "bytes": "{{ 'é'.encode('ascii') }}",
}
SANDBOX = {
    "class": "{{ ''.__class__.__mro__ }}",
    "subclasses": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "attr": "{{ ('' | attr('__class__')).x }}",
    "item": "{{ ''['__class__']['__mro__'] }}",
    "format": "{{ '{0.__class__.__mro__}'.format('') }}",
    "format_through_attr": "{{ ('{0.__class__.__mro__}' | attr('format'))('') }}",
    "globals": "{{ raise_exception.__globals__['x'] }}",
    "joiner": "{{ joiner.__init__.__globals__ }}",
    "namespace": "{{ namespace(__class__=1) }}",
    "generator": "{% macro f() %}{% endmacro %}{{ (messages | map('string')).gi_frame.f_globals }}",
    "mutation": "{{ messages.append(1) }}",
    "include": "{% include 'x' %}",
    "import": "{% import 'os' as os %}{{ os }}",
    "extends": "{% extends messages %}",
}
SYNTAX = {
    "parentheses": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "lists": "{{ " + "[" * 5000 + "1" + "]" * 5000 + " }}",
    "not": "{{ " + "not " * 20_000 + "1 }}",
    "plus": "{{ " + " + ".join(["messages"] * 20_000) + " }}",
    "loops": "{% for a in [1] %}" * 30 + "{% endfor %}" * 30,
    "ifs": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "dots": "{{ messages" + ".x" * 20_000 + " }}",
    "filters": "{{ 1" + "|string" * 10_000 + " }}",
    "long": "x" * ((1 << 18) + 1),
    "unclosed": "{{",
    "break": "{% break %}",
    "duplicate": "{% block a %}{% endblock %}{% block a %}{% endblock %}",
    "unknown": "{{ 1 | nothing }}",
    "assigned": "{% set loop.x = 1 %}{% for a in 1 %}{% endfor %}",
    "surrogate": "{{ '\ud800' }}{{ 1 / 0 }}",
    "many_arguments": "{{ f(" + "**a, " * 3 + ") }}",
    "chained_filters": "{% set n = namespace(x=['a']) %}{% for i in range(99999) %}{% set n.x = n.x | map('trim') %}{% endfor %}"
    "{{ n.x | list }}",
    "deep_list": "{% set n = namespace(x=[]) %}{% for i in range(99999) %}{% set n.x = [n.x] %}{% endfor %}{{ n.x }}",
}
HOSTILE = {
    f"{kind}-{name}": template
    for kind, templates in (
        ("loops", LOOPS), ("texts", TEXTS), ("numbers", NUMBERS), ("sandbox", SANDBOX), ("syntax", SYNTAX)
    )
    for name, template in templates.items()
}  # fmt: skip


@pytest.mark.parametrize("template", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_template_is_refused(tokenizer, template):
    with pytest.raises(TemplateError) as caught:
        Renderer(tokenizer, template, None, {})(PLAIN)
    assert "MemoryError" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_methods_of_rich_objects_are_not_for_templates(tokenizer, tmp_path):
    """NumPy's `tofile` writes a file, and the sandbox of jinja2 lets a template call it."""
    file = tmp_path / "written"
    messages = [{"role": "user", "content": "Hi", "image": np.zeros(3)}]
    with pytest.raises(TemplateError, match="method of a ndarray; expected rows of plain JSON values"):
        Renderer(tokenizer, "{{ messages[0].image.tofile(path) }}", None, {"path": str(file)})(messages)
    assert not file.exists()


def test_the_limit_is_told_of_the_row(tokenizer):
    with pytest.raises(TemplateError, match="the chat template takes over 300,000 steps for one conversation"):
        encode_chat(tokenizer, PLAIN, chat_template=LOOPS["nested"])
    with pytest.raises(TemplateError, match="not valid Jinja"):
        compile_template(SYNTAX["loops"])


def test_a_date_among_the_values_can_be_written():
    day = datetime(2024, 7, 26)
    render = Renderer(byte_tokenizer(), "{{ day.strftime('%d %b') }}{{ messages[0].content }}", None, {"day": day})
    assert render([{"role": "user", "content": " x"}]) == "26 Jul x"
