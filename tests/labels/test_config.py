"""Options: known values only, and template variables beside them."""

from __future__ import annotations

import pytest

from hf_objectives.errors import ConfigError
from hf_objectives.labels.config import EncodingConfig, LabelConfig


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"overlength": "truncate"}, "expected one of drop, split_turns, cut"),
        ({"max_length": 1}, "at least 2"),
        ({"train_on": "users"}, "train_on is 'users'"),
        ({"control_tokens": "never"}, "control_tokens is 'never'"),
    ],
)
def test_bad_settings_are_named(options, words):
    with pytest.raises(ConfigError, match=words):
        EncodingConfig(**options)


def test_other_keywords_are_template_variables():
    config = LabelConfig.from_keywords({"max_length": 7, "template_kwargs": {"a": 1}, "enable_thinking": False})
    assert config == LabelConfig(max_length=7, template_kwargs={"a": 1, "enable_thinking": False})
    assert LabelConfig.from_keywords(config.options()) == config
    assert EncodingConfig(template_kwargs=None).template_kwargs == {}
