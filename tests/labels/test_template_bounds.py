# ruff: noqa: E501 (a template is one line)

"""A template that is bounded writes what it writes without bounds."""

from __future__ import annotations

import pytest
from transformers.utils import chat_template_utils

from hf_objectives.labels.templates import Renderer
from tests.support.chat_corpus import PLAIN, byte_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(3) %}{{ i ** 2 }}{{ i * 2 }}{{ 7 % (i + 1) }}{{ 'a' * i }}{% endfor %}",
        "{{ messages[1:] | map(attribute='role') | join(', ') }}",
        "{{ messages | selectattr('role', 'eq', 'user') | list | length }}",
        "{{ 'a-b-c'.replace('-', '+') }}{{ 'a-b' | replace('-', '+') }}{{ 'x' | center(9) }}{{ 'x\ny' | indent(2) }}",
        "{{ '%s is %05.1f' % ('x', 2.5) }}{{ '%s' | format('y') }}{{ '{:>5}{x}'.format('z', x=1) }}{{ '{{}}'.format() }}",
        "{{ ', '.join(['a', 'b']) }}{{ ['b', 'a'] | sort | join }}{{ [1, 1] | unique | list }}{{ [1, 2] | sum }}",
        "{{ messages | tojson(indent=2) }}{{ {'b': 1, 'a': [1]} | tojson(sort_keys=true, separators=(',', ':')) }}",
        "{% for a in range(100) %}{{ loop.length }}{{ loop.last }}{% if a > 70 %}{% break %}{% endif %}{% endfor %}",
        "{% for a in messages | map(attribute='role') %}{{ loop.length }}{{ loop.revindex }}{{ a }}{% endfor %}",
        "{% for a in [1, [2, [3]]] recursive %}{{ loop(a) if a is iterable else a }}{% endfor %}",
        "{% macro f(n) %}{{ n }}{% if n %}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(5) }}{% set x %}{{ f(2) }}{% endset %}{{ x }}",
        "{% set n = namespace(x='') %}{% for m in messages %}{% set n.x = n.x + m.role ~ 1 ~ [m.role] %}{% endfor %}{{ n.x }}",
        "{% for k, v in messages[0] | items %}{{ k }}={{ v }};{% endfor %}{{ messages[0] in messages }}{{ [1] == [1] }}",
        "{{ 'abc' + '1' + '2' + '3' + '4' + messages[0].role + messages[0].role + messages[0].role + messages[0].role }}",
        "{{ missing }}{{ missing + 'x' if missing else none }}{{ messages[0].content.split(' ')[-1].strip('!') }}",
        "{% for a in '' %}{% else %}empty{% endfor %}{% for a in missing %}{% else %}none{% endfor %}",
        "{% filter upper %}a{{ messages[0].role }}{% endfilter %}{% block b %}{{ 1 + 2 + 3 }}{% endblock %}{{ self.b() }}",
        "{{ [1, 2, 3] | batch(2, 0) | list }}{{ [3, 1] | max }}{{ 3.14159 | round(2) }}{{ '12' | int + 1 }}{{ 'a b' | title }}",
    ],
)
def test_limits_leave_what_a_template_writes(tokenizer, source):
    theirs = chat_template_utils._compile_jinja_template(source)
    variables = {**tokenizer.special_tokens_map, "tools": None, "documents": None}
    expected = theirs.render(messages=PLAIN, add_generation_prompt=False, **variables)
    assert Renderer(tokenizer, source, None, {})(PLAIN) == expected
