"""The checks that every room shares."""

from __future__ import annotations

import pytest

from hf_objectives.errors import ConfigError
from hf_objectives.types import called_by, check_keys, check_max_length, check_one_of


def test_a_known_value_passes_and_an_unknown_one_is_named_with_the_nearest():
    check_one_of("strategy", "concat", ("best_fit", "concat"))
    check_one_of("preset", None, (None, "gpt3"))
    with pytest.raises(ConfigError) as error:
        check_one_of("strategy", "bestfit", ("best_fit", "concat"))
    assert str(error.value) == "strategy is 'bestfit'; expected one of best_fit, concat; did you mean 'best_fit'?"


def test_all_unknown_keys_are_named_at_once():
    check_keys("mixture", ["unit"], ("unit", "seed"))
    with pytest.raises(ConfigError) as error:
        check_keys("mixture", ["unit", "sede", 3], ("unit", "seed"))
    assert str(error.value) == "mixture: unknown key 'sede' (did you mean 'seed'?), 3; expected unit, seed"


@pytest.mark.parametrize("max_length", [None, 2, 4096])
def test_a_limit_that_leaves_something_to_predict_passes(max_length):
    assert check_max_length(max_length) is None


@pytest.mark.parametrize("max_length", [1, 0, -5])
def test_a_limit_of_less_than_two_tokens_is_refused(max_length):
    with pytest.raises(ConfigError, match=f"max_length is {max_length}; expected at least 2"):
        check_max_length(max_length)


class Host:
    def asks(self):
        return called_by(__name__, "Host.asks"), called_by(__name__, "asks"), called_by("accelerate.data_loader")


def test_a_caller_is_known_by_its_qualified_name():
    assert Host().asks() == (True, False, False)
    assert not called_by(__name__, "Host.asks") and called_by(__name__)
