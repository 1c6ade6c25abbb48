"""Reward functions of PPO, checked: what they return is one finite number an answer, or an error names the answer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence, Set
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl.trainer.utils import get_callable_name, is_async_callable

from hf_objectives.errors import ConfigError, HFObjectivesError
from hf_objectives.labels import document_frame

_QUOTED = 120  # characters of a prompt and an answer that an error quotes
RewardFunction = Callable[..., Any]


class RewardError(HFObjectivesError, RuntimeError):
    """A reward function that failed, or returned what is no reward; names the function and the answer."""


def checked(function: RewardFunction, *, on_error: str, tell_failed: Callable[[set[int]], None]) -> RewardFunction:
    """The function, for TRL's trainers, with its rewards checked.

    None stays what it is in TRL: this function has nothing to say on this answer.

    Args:
        function: called with `prompts`, `completions`, `completion_ids` and the columns of the rows, as lists; it returns one
            number or None an answer: a list, an array, or a tensor on any device. It may be a coroutine function.
        on_error: "error", or "missing" to take what fails for None, and tell of it.
        tell_failed: is told which answers these were, at every call.

    Raises (from a call):
        RewardError: it raised, or returned another number of rewards, or a reward that is no finite number.
    """
    name = get_callable_name(function)

    def settle(outcome: Any, singles: list[Any], arguments: dict[str, Any]) -> list[float | None]:
        """Rewards from what the function returned or raised: for all answers at once, or else for each by itself."""
        if not isinstance(outcome, Exception):
            return verdict(_as_list(outcome, name, len(arguments["completions"])), arguments)
        failures = [i for i, single in enumerate(singles) if isinstance(single, Exception)]
        if on_error == "error":
            i = failures[0] if failures else None
            error = outcome if i is None else singles[i]
            where = f"{len(singles)} answers at once" if i is None else _answer(arguments, i)
            raise RewardError(
                f"reward function {name!r} raised {type(error).__name__}: {error}; for {where} "
                "(reward_errors='missing' leaves such answers out)"
            ) from error
        known = [None if isinstance(single, Exception) else _as_list(single, name, 1)[0] for single in singles]
        return verdict(known, arguments, set(failures))

    def verdict(rewards: list[Any], arguments: dict[str, Any], failed: Set[int] = frozenset()) -> list[float | None]:
        bad = {i for i, reward in enumerate(rewards) if reward is not None and not _is_number(reward)}
        if bad and on_error == "error":
            i = min(bad)
            raise RewardError(
                f"reward function {name!r} returned {rewards[i]!r} for {_answer(arguments, i)}; expected a finite number, or "
                "None where it has nothing to say (reward_errors='missing' leaves such answers out)"
            )
        tell_failed(bad | failed)
        return [None if reward is None or i in bad else float(reward) for i, reward in enumerate(rewards)]

    def attempt(arguments: dict[str, Any]) -> Any:
        try:
            return function(**arguments)
        except Exception as error:
            return error

    async def attempt_async(arguments: dict[str, Any]) -> Any:
        try:
            return await function(**arguments)
        except Exception as error:
            return error

    # After a failure the answers are asked again one by one: the one at fault is known, the others keep their reward.
    def ask(**arguments: Any) -> list[float | None]:
        outcome = attempt(arguments)
        singles = [attempt(one) for one in _singles(arguments)] if isinstance(outcome, Exception) else []
        return settle(outcome, singles, arguments)

    async def ask_async(**arguments: Any) -> list[float | None]:
        outcome = await attempt_async(arguments)
        singles = [await attempt_async(one) for one in _singles(arguments)] if isinstance(outcome, Exception) else []
        return settle(outcome, singles, arguments)

    wrapper: RewardFunction = ask_async if is_async_callable(function) else ask
    wrapper.__name__ = name  # TRL logs under it
    return wrapper


def checked_rewards(
    functions: Any, tokenizers: Any, *, on_error: str, tell_failed: Callable[[set[int]], None]
) -> tuple[list[Any], list[Any]]:
    """Reward functions and models as TRL's trainers take them, and the tokenizer of each model.

    Args:
        functions: a function, a model, the path of one, or a list of these.
        tokenizers: one for each, or None.
        on_error, tell_failed: see `checked`.

    Raises:
        ConfigError: what is neither function nor model, a model that cannot give rewards (see `check_reward_model`), or
            another number of tokenizers.
    """
    functions = list(functions) if isinstance(functions, (list, tuple)) else [functions]
    if tokenizers is None:
        tokenizers = [None] * len(functions)
    tokenizers = list(tokenizers) if isinstance(tokenizers, (list, tuple)) else [tokenizers]
    if len(tokenizers) != len(functions):
        raise ConfigError(f"{len(tokenizers)} reward_processing_classes for {len(functions)} reward functions")
    for i, function in enumerate(functions):
        if isinstance(function, str):
            path = function
            function, has_head = load_scorer(path)
            if not has_head:
                raise ConfigError(f"{path} has no score head; expected a reward model")
        if isinstance(function, nn.Module):
            tokenizer = check_reward_model(function, tokenizers[i])
            tokenizers[i] = None if tokenizer is None else FramedTexts(tokenizer)
            functions[i] = function.eval()  # dropout would make a reward of chance
        elif callable(function):
            functions[i] = checked(function, on_error=on_error, tell_failed=tell_failed)
        else:
            raise ConfigError(f"reward function {i} is {type(function).__name__}; expected a function or a model")
    return functions, tokenizers


class FramedTexts:
    """A reward model's tokenizer that frames plain texts as training on them did: BOS before, EOS after a finished answer.

    TRL's RLOOTrainer gives a reward model prompt and answer bare, and a head that was trained at the EOS would be read at
    another token. Chats have what their template gives them.

    Attributes:
        ended: whether each of the texts to come ends with a stop token; None for chats.
    """

    def __init__(self, tokenizer: Any) -> None:
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        self._tokenizer = tokenizer
        self.ended: list[bool] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, *, text: list[str], **settings: Any) -> Any:
        if self.ended is not None:
            frame = document_frame(self._tokenizer)
            begin, end = self._tokenizer.decode(frame.before), self._tokenizer.decode([frame.after])
            text = [begin + one + end * done for one, done in zip(text, self.ended, strict=True)]
        return self._tokenizer(text=text, **settings)


def _as_list(output: Any, name: str, expected: int) -> list[Any]:
    try:
        rewards = output.tolist() if hasattr(output, "tolist") else output  # tensors of any device, arrays
    except NotImplementedError as error:
        raise RewardError(f"reward function {name!r} returned a tensor without values: {error}") from error
    if isinstance(rewards, (str, bytes)) or not isinstance(rewards, Sequence):
        raise RewardError(
            f"reward function {name!r} returned {type(output).__name__}; expected a list of {expected} rewards"
        )
    if len(rewards) != expected:
        raise RewardError(
            f"reward function {name!r} returned {len(rewards)} rewards for {expected} answers; expected one an answer"
        )
    return list(rewards)


def _is_number(value: Any) -> bool:
    value = value.item() if hasattr(value, "item") else value
    return isinstance(value, (int, float)) and math.isfinite(value)


def _singles(arguments: dict[str, Any]) -> list[dict[str, Any]]:
    n = len(arguments["completions"])
    return [
        {key: [value[i]] if isinstance(value, list) and len(value) == n else value for key, value in arguments.items()}
        for i in range(n)
    ]


def _answer(arguments: dict[str, Any], i: int) -> str:
    def quoted(value: Any) -> str:
        text = value if isinstance(value, str) else str(value[-1].get("content", "")) if value else ""
        return repr(text if len(text) <= _QUOTED else text[:_QUOTED] + "...")

    rows = arguments.get("row")
    row = f"row {rows[i]}, " if isinstance(rows, list) else ""
    completions, prompts = arguments["completions"], arguments.get("prompts")
    asked = f", prompt {quoted(prompts[i])}" if prompts else ""
    return f"{row}answer {i} of {len(completions)}{asked}, answered {quoted(completions[i])}"


def check_finite(rewards: Tensor, name: str, answers: Sequence[Any]) -> None:
    """Raise where a reward model says NaN or infinity.

    Args:
        rewards: float [batch], one an answer.
        name: of the model.
        answers: completions, for the error.

    Raises:
        RewardError: names the first such answer.
    """
    bad = (~torch.isfinite(rewards)).nonzero().flatten().tolist()
    if bad:
        answer = _answer({"completions": answers}, bad[0])
        raise RewardError(
            f"reward model {name!r} says {float(rewards[bad[0]])} for {answer}; expected a finite number "
            "(reward_errors='missing' leaves such answers out)"
        )


def load_scorer(path: str) -> tuple[Any, bool]:
    """A sequence classifier with one label from a folder, and whether the folder has its score head too."""
    model, info = AutoModelForSequenceClassification.from_pretrained(
        path, num_labels=1, dtype=torch.float32, output_loading_info=True
    )
    if getattr(model, "peft_config", None):
        raise ConfigError(f"{path} holds an adapter; expected a whole reward model, merge the adapter first")
    return model, not info["missing_keys"]


def check_reward_model(model: nn.Module, tokenizer: Any) -> Any:
    """The tokenizer of a reward model, which is its own and not the policy's.

    Args:
        model: a sequence classifier with one label.
        tokenizer: what was given for it; None to take that of its folder.

    Raises:
        ConfigError: more than one label, no tokenizer to be found, or one that is not the model's.
    """
    config: Any = model.config
    name = config._name_or_path or type(model).__name__
    if getattr(config, "num_labels", 1) != 1:
        raise ConfigError(f"reward model {name} has {config.num_labels} labels; expected 1, the reward")
    own = None
    if config._name_or_path and (Path(config._name_or_path) / "tokenizer_config.json").exists():
        own = AutoTokenizer.from_pretrained(config._name_or_path)
    if tokenizer is None and own is None and not config._name_or_path:
        raise ConfigError(
            "a reward model that was not loaded from a folder needs its tokenizer: reward_processing_classes"
        )
    if tokenizer is not None and own is not None and tokenizer.get_vocab() != own.get_vocab():
        raise ConfigError(
            f"reward model {name} was given a tokenizer of {len(tokenizer):,} tokens that is not its own, of {len(own):,}; "
            "its reward would be of other words. Leave reward_processing_classes out, or give the tokenizer of its folder"
        )
    if tokenizer is None and own is None:
        own = AutoTokenizer.from_pretrained(config._name_or_path)
    given = tokenizer if tokenizer is not None else own
    size = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    if given is not None and len(given) > size:
        raise ConfigError(
            f"reward model {name} has {size:,} token embeddings, its tokenizer {len(given):,} tokens; expected the tokenizer "
            "that it was trained with"
        )
    return given
