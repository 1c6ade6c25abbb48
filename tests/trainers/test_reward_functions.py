"""Reward functions: what they may return, and how what they may not is named, or left out and told."""

from __future__ import annotations

import asyncio
import functools
import math

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from hf_objectives import demo
from hf_objectives.errors import ConfigError, HFObjectivesError
from hf_objectives.trainers.reward_functions import (
    RewardError,
    check_finite,
    check_reward_model,
    checked,
    is_async_callable,
    load_scorer,
)
from tests.support.chat_corpus import byte_tokenizer

COMPLETIONS = ["one", "two", "three"]
ARGUMENTS = {
    "prompts": ["a", "b", "c"],
    "completions": COMPLETIONS,
    "completion_ids": [[1], [2, 3], [4]],
    "answer": ["one", "deux", "three"],
    "row": [10, 20, 30],
    "trainer_state": object(),
}
TOKENIZER = demo.build_tokenizer()


def call(function, on_error="error", **arguments):
    """Rewards, and which answers failed."""
    failed: list[set[int]] = []
    found = checked(function, on_error=on_error, tell_failed=failed.append)
    outcome = found(**{**ARGUMENTS, **arguments})
    if asyncio.iscoroutine(outcome):
        outcome = asyncio.run(outcome)
    assert len(failed) == 1
    return outcome, failed[0]


def returning(value):
    def reward(**_):
        return value

    return reward


@pytest.mark.parametrize(
    "value",
    [
        [1, 0.5, -2],
        (1, 0.5, -2),
        np.array([1, 0.5, -2], dtype=np.float32),
        torch.tensor([1, 0.5, -2]),
        torch.tensor([1, 0.5, -2], dtype=torch.bfloat16, requires_grad=True),
        [torch.tensor(1), np.float64(0.5), np.int64(-2)],
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_may_be_returned(value):
    assert call(returning(value)) == ([1.0, 0.5, -2.0], set())


def test_booleans_and_none():
    assert call(returning([True, None, np.bool_(False)])) == ([1.0, None, 0.0], set())


class OnADevice:
    """A tensor of an accelerator: numpy cannot read it, its own `tolist` can."""

    def __array__(self, *_, **__):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def __iter__(self):
        raise TypeError("slow, one synchronisation an element")

    def tolist(self):
        return [1.0, 0.5, -2.0]


def test_a_tensor_on_another_device():
    assert call(returning(OnADevice())) == ([1.0, 0.5, -2.0], set())


def test_a_tensor_without_values():
    with pytest.raises(RewardError, match="reward function 'reward' returned a tensor without values"):
        call(returning(torch.zeros(3, device="meta")))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1.0, 2.0], "returned 2 rewards for 3 answers; expected one an answer"),
        ([], "returned 0 rewards for 3 answers"),
        (1.0, "returned float; expected a list of 3 rewards"),
        (torch.tensor(1.0), "returned Tensor; expected a list of 3 rewards"),
        (None, "returned NoneType; expected a list"),
        ("123", "returned str; expected a list"),
        ({0: 1.0, 1: 2.0, 2: 3.0}, "returned dict; expected a list"),
        ((one for one in (1.0, 2.0, 3.0)), "returned generator; expected a list"),
    ],
)
@pytest.mark.parametrize("on_error", ["error", "missing"])
def test_what_is_no_list_of_rewards_is_always_an_error(value, message, on_error):
    """It cannot be known which answer a reward would be of."""
    with pytest.raises(RewardError, match=message):
        call(returning(value), on_error)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, "0.5", [0.5], torch.tensor(float("nan"))], ids=str)
def test_what_is_no_number(bad):
    with pytest.raises(RewardError) as caught:
        call(returning([1.0, bad, 3.0]))
    for part in (
        "reward function 'reward' returned",
        "row 20, answer 1 of 3",
        "prompt 'b'",
        "answered 'two'",
        "missing'",
    ):
        assert part in str(caught.value)
    assert call(returning([1.0, bad, 3.0]), "missing") == ([1.0, None, 3.0], {1})
    assert isinstance(caught.value, HFObjectivesError)


def fails_on_two(completions, answer, **_):
    """Would be 1.0 for a right answer."""
    if "two" in completions:
        raise KeyError("no such word")
    return [float(a == b) for a, b in zip(completions, answer, strict=True)]


async def fails_on_two_later(**arguments):
    await asyncio.sleep(0)
    return fails_on_two(**arguments)


@pytest.mark.parametrize("function", [fails_on_two, fails_on_two_later])
def test_a_function_that_raises(function):
    with pytest.raises(RewardError) as caught:
        call(function)
    for part in (function.__name__, "KeyError: 'no such word'", "row 20, answer 1 of 3, prompt 'b', answered 'two'"):
        assert part in str(caught.value)
    assert isinstance(caught.value.__cause__, KeyError)
    assert call(function, "missing") == ([1.0, None, 1.0], {1})


def test_a_failure_of_the_whole_batch():
    def only_alone(completions, **_):
        if len(completions) > 1:
            raise MemoryError("too many")
        return [1.0]

    with pytest.raises(RewardError, match="raised MemoryError: too many; for 3 answers at once"):
        call(only_alone)
    assert call(only_alone, "missing") == ([1.0, 1.0, 1.0], set())


def test_one_by_one_each_answer_has_its_own_columns():
    seen = []

    def reward(completions, answer, completion_ids, trainer_state, **_):
        seen.append((completions, answer, completion_ids))
        assert trainer_state is ARGUMENTS["trainer_state"]
        raise ValueError

    assert call(reward, "missing") == ([None] * 3, {0, 1, 2})
    assert seen[1:] == [(["one"], ["one"], [[1]]), (["two"], ["deux"], [[2, 3]]), (["three"], ["three"], [[4]])]


def test_conversations_are_quoted():
    chats = {
        "prompts": [[{"role": "user", "content": "hi " * 100}]],
        "completions": [[{"role": "assistant", "content": "ho"}]],
        "row": None,
    }
    with pytest.raises(RewardError, match=r"answer 0 of 1, prompt '(hi ){40}\.\.\.', answered 'ho'"):
        call(returning([math.nan]), **chats)


def test_names_and_coroutines():
    class Scorer:
        async def __call__(self, **_):
            return [0.0, 0.0, 0.0]

    keep = {"on_error": "error", "tell_failed": lambda failed: None}
    assert checked(fails_on_two, **keep).__name__ == "fails_on_two"
    assert checked(Scorer(), **keep).__name__ == "Scorer"
    for function, awaited in ((fails_on_two, False), (fails_on_two_later, True), (Scorer(), True)):
        assert is_async_callable(function) == is_async_callable(checked(function, **keep)) == awaited
        partial = functools.partial(function)
        assert is_async_callable(partial) == is_async_callable(checked(partial, **keep))
    assert call(Scorer()) == ([0.0, 0.0, 0.0], set())
    assert call(functools.partial(fails_on_two_later), "missing") == ([1.0, None, 1.0], {1})


# -- reward models ---------------------------------------------------------------------------------------------------


def reward_model(vocab_size: int = len(TOKENIZER), **options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForSequenceClassification(
        LlamaConfig(vocab_size=vocab_size, pad_token_id=0, **{"num_labels": 1, **sizes, **options})
    )


def saved(model, folder, tokenizer=TOKENIZER):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return type(model).from_pretrained(folder)


def test_the_tokenizer_of_a_reward_model(tmp_path):
    model = saved(reward_model(), tmp_path)
    assert check_reward_model(model, None).get_vocab() == TOKENIZER.get_vocab()
    assert check_reward_model(model, TOKENIZER) is TOKENIZER
    with pytest.raises(
        ConfigError, match="was given a tokenizer of .* tokens that is not its own, of .*reward_processing_c"
    ):
        check_reward_model(model, byte_tokenizer())


def test_reward_models_that_cannot_be():
    with pytest.raises(ConfigError, match="has 2 labels; expected 1"):
        check_reward_model(reward_model(num_labels=2), TOKENIZER)
    with pytest.raises(ConfigError, match="needs its tokenizer: reward_processing_classes"):
        check_reward_model(reward_model(), None)
    with pytest.raises(ConfigError, match="has 20 token embeddings, its tokenizer"):
        check_reward_model(reward_model(20), TOKENIZER)


def test_a_folder_without_a_score_head(tmp_path):
    saved(reward_model(), tmp_path / "scores")
    model, has_head = load_scorer(str(tmp_path / "scores"))
    assert has_head and model.config.num_labels == 1
    saved(LlamaForCausalLM(reward_model().config), tmp_path / "speaks")
    assert not load_scorer(str(tmp_path / "speaks"))[1]


def test_a_model_that_says_nan():
    check_finite(torch.tensor([1.0, -2.0, 0.0]), "judge", COMPLETIONS)
    for bad in (math.nan, math.inf):
        with pytest.raises(RewardError, match=f"reward model 'judge' says {bad} for answer 2 of 3, answered 'three'"):
            check_finite(torch.tensor([1.0, 2.0, bad]), "judge", COMPLETIONS)
