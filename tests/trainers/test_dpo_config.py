"""Settings of PerplexityDPOTrainer that cannot work."""

from __future__ import annotations

import pytest

from hf_objectives import PerplexityDPOConfig
from hf_objectives.errors import ConfigError
from tests.support.dpo_worlds import options


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"nll_weight": -1.0}, "nll_weight"),
        ({"dpop_lambda": float("nan")}, "dpop_lambda"),
        ({"dpop_lambda": 1.0, "loss_type": ["ipo"]}, "loss_type"),
        ({"dpop_lambda": 1.0, "use_weighting": True}, "use_weighting"),
        ({"dpop_lambda": 1.0, "ld_alpha": 0.5}, "ld_alpha"),
        ({"dpop_lambda": 1.0, "f_divergence_type": "js_divergence"}, "f_divergence_type"),
        ({"warn_chosen_drop": -0.1}, "warn_chosen_drop"),
        ({"max_perplexity_increase": 0.0}, "max_perplexity_increase"),
        ({"train_on": "user"}, "train_on"),
        ({"control_tokens": "x"}, "control_tokens"),
    ],
)
def test_settings_that_cannot_work(changed, words, tmp_path):
    with pytest.raises(ConfigError, match=words):
        PerplexityDPOConfig(**options(tmp_path, **changed))
