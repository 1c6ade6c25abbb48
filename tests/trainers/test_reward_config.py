"""Arguments of RewardModelTrainer that are unknown."""

from __future__ import annotations

import pytest

from hf_objectives import RewardModelConfig
from hf_objectives.errors import ConfigError


def test_an_unknown_choice_is_named(tmp_path):
    with pytest.raises(
        ConfigError, match="control_tokens is 'alow'; expected one of plain, allow; did you mean 'allow'"
    ):
        RewardModelConfig(str(tmp_path), use_cpu=True, control_tokens="alow")
