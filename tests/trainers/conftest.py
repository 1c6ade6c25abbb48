"""Models that the tests of trainers load by name."""

from __future__ import annotations

import pytest

from hf_objectives import demo


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> tuple[str, str]:
    """Two tiny models, saved as a user's would be: the parent loads its reference by name."""
    made = []
    for seed in (0, 1):
        folder = tmp_path_factory.mktemp(f"model_{seed}")
        demo.build_model(demo.build_tokenizer(), hidden_size=32, num_layers=2, seed=seed).save_pretrained(folder)
        made.append(str(folder))
    return made[0], made[1]
