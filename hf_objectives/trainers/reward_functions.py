"""Reward functions and reward models of PPO, checked: one finite number for each answer, or an error that names it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_objectives.errors import ConfigError, HFObjectivesError
from hf_objectives.labels import document_frame
from hf_objectives.trainers.hf_compat import origin_of
from hf_objectives.trainers.trl_compat import get_callable_name, is_async_callable

_QUOTED = 120  # characters of a prompt and of an answer in an error
_HINT = "(reward_errors='missing' leaves such answers out)"
RewardFunction = Callable[..., Any]


class RewardError(HFObjectivesError, RuntimeError):
    """A reward function failed or did not return rewards; names the function and the answer."""


def checked(function: RewardFunction, *, on_error: str, tell_failed: Callable[[set[int]], None]) -> RewardFunction:
    """Wrap a reward function for TRL's trainers so that its rewards are checked.

    None stays what it is in TRL: the function has no reward for this answer. When a call raises, the answers are asked for
    again one by one. So the answer at fault is known, and the others keep their reward.

    Args:
        function: called with `prompts`, `completions`, `completion_ids` and the columns of the rows, as lists. It returns a
            number or None for each answer, as a list, an array, or a tensor on any device. It may be a coroutine function.
        on_error: "error", or "missing" to use None for answers on which the function fails.
        tell_failed: is called with the numbers of these answers.

    Raises (from a call):
        RewardError: the function raised, or returned another number of rewards, or a reward that is no finite number.
    """
    name = get_callable_name(function)

    def settle(outcome: Any, singles: list[Any], arguments: dict[str, Any]) -> list[float | None]:
        rewards = singles
        if not isinstance(outcome, Exception):
            rewards = _as_list(outcome, name, len(arguments["completions"]))
        elif on_error == "error" and not any(isinstance(single, Exception) for single in singles):
            raise _raised(name, outcome, f"{len(singles)} answers at once") from outcome
        bad = {i for i, reward in enumerate(rewards) if reward is not None and not _is_number(reward)}
        if bad and on_error == "error":
            reward, answer = rewards[min(bad)], _answer(arguments, min(bad))
            if isinstance(reward, Exception):
                raise _raised(name, reward, answer) from reward
            raise RewardError(
                f"reward function {name!r} returned {reward!r} for {answer}; expected a finite number, or None for no reward "
                + _HINT
            )
        tell_failed(bad)
        return [None if reward is None or i in bad else float(reward) for i, reward in enumerate(rewards)]

    def ask(**arguments: Any) -> list[float | None]:
        def attempt(part: dict[str, Any]) -> Any:
            try:
                return function(**part)
            except Exception as error:
                return error

        outcome = attempt(arguments)
        parts = _singles(arguments) if isinstance(outcome, Exception) else []
        return settle(outcome, [_one(attempt(part), name) for part in parts], arguments)

    async def ask_async(**arguments: Any) -> list[float | None]:
        async def attempt(part: dict[str, Any]) -> Any:
            try:
                return await function(**part)
            except Exception as error:
                return error

        outcome = await attempt(arguments)
        parts = _singles(arguments) if isinstance(outcome, Exception) else []
        return settle(outcome, [_one(await attempt(part), name) for part in parts], arguments)

    wrapper: RewardFunction = ask_async if is_async_callable(function) else ask
    wrapper.__name__ = name  # TRL logs under it
    return wrapper


def checked_rewards(
    functions: Any, tokenizers: Any, *, on_error: str, tell_failed: Callable[[set[int]], None]
) -> tuple[list[Any], list[Any]]:
    """Check reward functions and models, and return them with the tokenizer of each, as TRL's trainers take them.

    Args:
        functions: a function, a model, the path of one, or a list of these.
        tokenizers: one for each, or None.
        on_error, tell_failed: see `checked`.
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
            functions[i] = function.eval()  # dropout would make rewards random
        elif callable(function):
            functions[i] = checked(function, on_error=on_error, tell_failed=tell_failed)
        else:
            raise ConfigError(f"reward function {i} is {type(function).__name__}; expected a function or a model")
    return functions, tokenizers


class FramedTexts:
    """A reward model's tokenizer that frames plain texts as in training: BOS before them, EOS after a finished answer.

    TRL's RLOOTrainer gives a reward model prompt and answer bare, so a head that was trained at EOS would be read at another
    token. Chats have the frame of their template.

    Attributes:
        ended: whether each of the next texts ends with a stop token; None for chats.
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
            text = [begin + answer + end * done for answer, done in zip(text, self.ended, strict=True)]
        return self._tokenizer(text=text, **settings)


def _raised(name: str, error: Exception, where: str) -> RewardError:
    return RewardError(f"reward function {name!r} raised {type(error).__name__}: {error}; for {where} {_HINT}")


def _as_list(output: Any, name: str, expected: int) -> list[Any]:
    try:
        rewards = output.tolist() if hasattr(output, "tolist") else output  # arrays, and tensors of any device
    except NotImplementedError as error:
        raise RewardError(f"reward function {name!r} returned a tensor without values: {error}") from error
    if isinstance(rewards, (str, bytes)) or not isinstance(rewards, Sequence):
        found = type(output).__name__
        raise RewardError(f"reward function {name!r} returned {found}; expected a list of {expected} rewards")
    if len(rewards) != expected:
        raise RewardError(
            f"reward function {name!r} returned {len(rewards)} rewards for {expected} answers; expected one an answer"
        )
    return list(rewards)


def _one(outcome: Any, name: str) -> Any:
    return outcome if isinstance(outcome, Exception) else _as_list(outcome, name, 1)[0]


def _is_number(value: Any) -> bool:
    value = value.item() if hasattr(value, "item") else value
    return isinstance(value, (int, float)) and math.isfinite(value)


def _singles(arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """The arguments for each answer alone."""
    n = len(arguments["completions"])
    return [
        {key: [value[i]] if isinstance(value, list) and len(value) == n else value for key, value in arguments.items()}
        for i in range(n)
    ]


def _answer(arguments: dict[str, Any], i: int) -> str:
    """Row, prompt and text of an answer, for an error."""

    def quoted(value: Any) -> str:
        text = value if isinstance(value, str) else str(value[-1].get("content", "")) if value else ""
        return repr(text if len(text) <= _QUOTED else text[:_QUOTED] + "...")

    rows, prompts, completions = arguments.get("row"), arguments.get("prompts"), arguments["completions"]
    row = f"row {rows[i]}, " if isinstance(rows, list) else ""
    asked = f", prompt {quoted(prompts[i])}" if prompts else ""
    return f"{row}answer {i} of {len(completions)}{asked}, answered {quoted(completions[i])}"


def check_finite(rewards: Tensor, name: str, answers: Sequence[Any]) -> None:
    """Refuse rewards of a reward model, float [batch], that are not finite; names the first such answer."""
    bad = (~torch.isfinite(rewards)).nonzero().flatten().tolist()
    if bad:
        answer = _answer({"completions": answers}, bad[0])
        raise RewardError(
            f"reward model {name!r} says {float(rewards[bad[0]])} for {answer}; expected a finite number {_HINT}"
        )


def load_scorer(path: str) -> tuple[Any, bool]:
    """Load a sequence classifier with one label, and tell whether the folder has its score head too."""
    model, info = AutoModelForSequenceClassification.from_pretrained(
        path, num_labels=1, dtype=torch.float32, output_loading_info=True
    )
    if getattr(model, "peft_config", None):
        raise ConfigError(f"{path} holds an adapter; expected a whole reward model, merge the adapter first")
    return model, not info["missing_keys"]


def check_reward_model(model: nn.Module, tokenizer: Any) -> Any:
    """Find the tokenizer of a reward model, which is its own and not the policy's.

    `tokenizer` is the one given for it; None for that of its folder.
    """
    config: Any = model.config
    origin = origin_of(model)
    name = origin or type(model).__name__
    if getattr(config, "num_labels", 1) != 1:
        raise ConfigError(f"reward model {name} has {config.num_labels} labels; expected 1, the reward")
    own: Any = None
    if origin and (tokenizer is None or (Path(origin) / "tokenizer_config.json").exists()):
        own = AutoTokenizer.from_pretrained(origin)
    if tokenizer is None and own is None:
        raise ConfigError(
            "a reward model that was not loaded from a folder needs its tokenizer: reward_processing_classes"
        )
    if tokenizer is not None and own is not None and tokenizer.get_vocab() != own.get_vocab():
        raise ConfigError(
            f"reward model {name} was given a tokenizer of {len(tokenizer):,} tokens that is not its own, of {len(own):,}; "
            "its reward would be of other words. Leave reward_processing_classes out, or give the tokenizer of its folder"
        )
    found: Any = own if tokenizer is None else tokenizer
    size = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    if len(found) > size:
        raise ConfigError(
            f"reward model {name} has {size:,} token embeddings, its tokenizer {len(found):,} tokens; expected the tokenizer "
            "that it was trained with"
        )
    return found
