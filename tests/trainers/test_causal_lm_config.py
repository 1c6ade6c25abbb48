"""Arguments of PerplexityTrainer that would make numbers wrong."""

from __future__ import annotations

import pytest

from hf_objectives.errors import ConfigError
from tests.support.language_models import arguments


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"z_loss": -1.0}, "z_loss is -1.0"),
        ({"label_smoothing_factor": 1.5}, "under 1"),
        ({"average_tokens_across_devices": False}, "leave it on"),
    ],
)
def test_bad_arguments_are_named(tmp_path, options, words):
    with pytest.raises(ConfigError, match=words):
        arguments(tmp_path, **options)
