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
        ({"label_names": ["targets"]}, "label_names is .'targets'.; .* the column 'labels' alone"),
        ({"label_names": ["labels", "start_positions"]}, "Leave label_names out"),
    ],
)
def test_bad_arguments_are_named(tmp_path, options, words):
    with pytest.raises(ConfigError, match=words):
        arguments(tmp_path, **options)


def test_the_usual_label_name_may_be_said(tmp_path):
    assert arguments(tmp_path, label_names=["labels"]).label_names == ["labels"]
