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
        ({"remove_unused_columns": True}, "seq_lengths .*leave it off"),
        ({"include_for_metrics": ["loss"]}, "compute_metrics"),
        ({"batch_eval_metrics": True}, "compute_metrics"),
        ({"include_num_input_tokens_seen": "non_padding"}, "num_tokens_seen is logged"),
        ({"optim": "adalomo"}, "optim is 'adalomo'.*stop_on_non_finite=False"),
        ({"optim": "galore_adamw_layerwise", "optim_target_modules": "all-linear"}, "stop_on_non_finite=False"),
        ({"label_names": ["targets"]}, "label_names is .'targets'.; .* the column 'labels' alone"),
        ({"label_names": ["labels", "start_positions"]}, "Leave label_names out"),
    ],
)
def test_bad_arguments_are_named(tmp_path, options, words):
    with pytest.raises(ConfigError, match=words):
        arguments(tmp_path, **options)


def test_the_usual_label_name_may_be_said(tmp_path):
    assert arguments(tmp_path, label_names=["labels"]).label_names == ["labels"]


def test_an_optimizer_that_steps_in_the_backward_pass_without_the_guard(tmp_path):
    assert arguments(tmp_path, optim="lomo", stop_on_non_finite=False).optim == "lomo"
