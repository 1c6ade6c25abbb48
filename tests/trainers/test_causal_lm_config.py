"""Arguments of PerplexityTrainer that would make numbers wrong."""

from __future__ import annotations

import pytest
from accelerate.parallelism_config import ParallelismConfig
from transformers import TrainingArguments

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


def test_rows_are_cut_among_the_processes_that_are_left(tmp_path, monkeypatch):
    assert arguments(tmp_path).parallelism_config is None
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setattr(TrainingArguments, "__post_init__", lambda self: None)  # it would wait for the others
    found = arguments(tmp_path, cp=4).parallelism_config
    assert (found.cp_size, found.dp_shard_size, found.tp_size, found.dp_replicate_size) == (4, 2, 1, 1)


def test_processes_that_cannot_be_divided(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="cp is 2 on 1 processes; expected a divisor"):
        arguments(tmp_path, cp=2)
    monkeypatch.setenv("WORLD_SIZE", "8")
    for cp in (3, 0, -2):
        with pytest.raises(ConfigError, match=f"cp is {cp} on 8 processes"):
            arguments(tmp_path, cp=cp)
    with pytest.raises(ConfigError, match="parallelism_config is given too"):
        arguments(tmp_path, cp=2, parallelism_config=ParallelismConfig(dp_shard_size=8))
    with pytest.raises(ConfigError, match="tp is 2; expected 1: .*FSDP2"):
        arguments(tmp_path, tp=2)


def test_the_usual_label_name_may_be_said(tmp_path):
    assert arguments(tmp_path, label_names=["labels"]).label_names == ["labels"]


def test_an_optimizer_that_steps_in_the_backward_pass_without_the_guard(tmp_path):
    assert arguments(tmp_path, optim="lomo", stop_on_non_finite=False).optim == "lomo"
