"""Settings and fixtures of all tests."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "corpus"), str(HERE / "trainers"), str(HERE.parent / "recipes"), str(HERE.parent)]

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.fixture(scope="session")
def real_model_path() -> str:
    """A real chat model, from HF_OBJECTIVES_TEST_MODEL (a folder or a Hub id); skips, with the reason, without one."""
    from transformers import AutoConfig

    path = os.environ.get("HF_OBJECTIVES_TEST_MODEL", DEFAULT_MODEL)
    try:
        AutoConfig.from_pretrained(path)
    except OSError as error:
        pytest.skip(f"no real model: {path} cannot be loaded ({str(error).splitlines()[0][:120]})")
    return path
