"""What a Trainer would take and never use is refused, with what to do instead."""

from __future__ import annotations

import pytest

from hf_objectives.errors import ConfigError
from hf_objectives.trainers import PerplexityTrainer
from tests.support.language_models import arguments, llama


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("compute_metrics", "on_evaluate"),
        ("preprocess_logits_for_metrics", "leave it out"),
        ("compute_loss_func", "override compute_loss"),
    ],
)
def test_callables_that_would_never_be_called(tmp_path, name, words):
    with pytest.raises(ConfigError, match=f"{name} .*{words}"):
        PerplexityTrainer(llama(), arguments(tmp_path), **{name: lambda *_, **__: {}})
