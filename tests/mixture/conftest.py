"""Short blocks, so that a few hundred rows cross many of their borders."""

from __future__ import annotations

import pytest

from tests.support.mixtures import KINDS


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch):
    monkeypatch.setattr("hf_objectives.mixture.order._DRAWS", 130)
    monkeypatch.setattr("hf_objectives.mixture.order._ROWS_PACKED", 50)


@pytest.fixture(params=list(KINDS))
def kind(request):
    """Every kind of mixture."""
    return request.param
