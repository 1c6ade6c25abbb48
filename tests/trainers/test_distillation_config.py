"""Settings of the distillation trainer: what is refused, and when."""

from __future__ import annotations

import pytest
from trl import DistillationConfig

from hf_objectives.errors import ConfigError
from hf_objectives.trainers.distillation_config import PerplexityDistillationConfig

QUIET = {"use_cpu": True, "bf16": False, "report_to": "none"}


def config(folder, **options):
    return PerplexityDistillationConfig(str(folder), **QUIET, **options)


def test_the_defaults_are_trls(tmp_path):
    ours, theirs = config(tmp_path), DistillationConfig(str(tmp_path), **QUIET)
    own = {"lmbda", "max_length", "train_on", "control_tokens", "eval_lm_max_length", "max_perplexity_increase"}
    differing = {
        name for name in DistillationConfig.__dataclass_fields__ if getattr(ours, name) != getattr(theirs, name)
    }
    assert differing <= {"logging_dir", "run_name"}
    assert {*PerplexityDistillationConfig.__dataclass_fields__} - {*DistillationConfig.__dataclass_fields__} == {
        *own,
        "resume_incomplete",
    }
    assert ours.lmbda == 1.0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lmbda": -0.1}, "lmbda is -0.1; expected 0 to 1"),
        ({"lmbda": float("nan")}, "lmbda is nan"),
        ({"beta": 1.5}, "beta is 1.5; expected 0 to 1"),
        ({"beta": float("nan")}, "beta is nan"),
        ({"temperature": 0.0}, "temperature is 0.0; expected more than 0"),
        ({"max_completion_length": None}, "max_completion_length is None"),
        ({"max_length": 1}, "max_length is 1"),
        ({"train_on": "asistant"}, "did you mean 'assistant'"),
        ({"control_tokens": "keep"}, "control_tokens is 'keep'"),
        ({"accelerator_config": {"even_batches": False}}, "even_batches=False would give"),
        ({"torch_compile": True}, "torch_compile makes all logits"),
    ],
)
def test_what_is_refused(tmp_path, options, words):
    with pytest.raises(ConfigError, match=words):
        config(tmp_path, **options)


def test_rows_for_a_step(tmp_path):
    given = config(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=3)
    given.check_rows([0] * 6)
    given.check_rows(iter([0]))
    with pytest.raises(ConfigError, match="train_dataset has 5 rows and a step takes 6"):
        given.check_rows([0] * 5)
