"""How far two renders agree."""

from __future__ import annotations

import re

from hf_objectives.labels.agreement import agreement, common_prefix, whole
from hypothesis import given
from hypothesis import strategies as st


@given(st.text("ab", max_size=8), st.text("ab", max_size=8))
def test_common_prefix(a, b):
    n = common_prefix(a, b)
    assert a[:n] == b[:n] and (n == min(len(a), len(b)) or a[n] != b[n])


def test_agreement_by_hand():
    assert agreement("}</call>\n<end>", "}</call> <end>\n") == (14, 14)
    assert agreement(" [INST]a", "[INST]b") == (7, 6)
    assert agreement("a ", "b") == (0, 0)


@given(st.text("ab \n", max_size=8), st.text("ab \n", max_size=8))
def test_agreement_is_the_common_prefix_of_what_is_no_white_space(a, b):
    in_a, in_b = agreement(a, b)
    said_a, said_b = "".join(a.split()), "".join(b.split())
    same = said_a[: common_prefix(said_a, said_b)]
    assert "".join(a[:in_a].split()) == "".join(b[:in_b].split()) == same


def test_a_control_token_is_not_split():
    markers = re.compile("<end>")
    assert [whole(markers, "a<end>b", cut) for cut in range(8)] == [0, 1, 1, 1, 1, 1, 6, 7]
