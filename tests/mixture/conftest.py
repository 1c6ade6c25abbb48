"""Short blocks, so that a few hundred rows cross many of their borders."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch):
    monkeypatch.setattr("hf_objectives.mixture.order._DRAWS", 130)
    monkeypatch.setattr("hf_objectives.mixture.order._ROWS_PACKED", 50)
