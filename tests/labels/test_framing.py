"""Room around documents: each has its own begin and end, empty ones too."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hf_objectives.labels.framing import make_room


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 2), st.booleans()), max_size=12))
def test_documents_lie_between_what_is_theirs(documents):
    sizes, before, after = (np.array([one[i] for one in documents], kind) for i, kind in enumerate((int, int, bool)))
    room = make_room(np.concatenate(([0], np.cumsum(sizes))), before, after)
    # Document i is written as 100 + i, what comes before it as -i - 1, what comes after as 1,000 + i.
    numbers, made = np.arange(len(documents)), np.zeros(room.offsets[-1], np.int64)
    made[room.text] = np.repeat(100 + numbers, sizes)
    made[room.before] = np.repeat(-numbers - 1, before)
    made[room.after] = 1_000 + numbers[after]
    assert [made[a:b].tolist() for a, b in itertools.pairwise(room.offsets)] == [
        [-i - 1] * front + [100 + i] * size + [1_000 + i] * back for i, (size, front, back) in enumerate(documents)
    ]
