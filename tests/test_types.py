"""What every room shares."""

from __future__ import annotations

import numpy as np
import torch

from hf_objectives.types import ends_of_runs


def test_ends_of_runs_by_hand():
    labels = [[-100, 4, 5, -100, 6], [7, -100, 8, 9, -100]]
    for values in (torch.tensor(labels), np.array(labels)):
        before = values.tolist()
        assert values[ends_of_runs(values)].tolist() == [5, 6, 7, 9] and values.tolist() == before
    assert ends_of_runs(np.array([-100, 5, 6, -100, 7])).tolist() == [False, False, True, False, True]
