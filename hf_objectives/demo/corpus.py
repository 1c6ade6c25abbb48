"""The corpus: questions of the skills as text, chats with a tool, preference pairs and a reward; split by question."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from hf_objectives.demo.skills import SKILLS, Question
from hf_objectives.errors import ConfigError, nearest

Split = Literal["train", "test"]
SYSTEM = "Answer briefly."
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "calculator",
            "description": "Compute a product.",
            "parameters": {
                "type": "object",
                "properties": {"expression": {"type": "string", "description": "such as 12*34"}},
                "required": ["expression"],
            },
        },
    }
]
_TEST_SHARE = 0.15


def questions(n: int, *, seed: int = 0, split: Split = "train", skills: Sequence[str] | None = None) -> list[Question]:
    """`n` questions of a split; a question is in one split or the other by its text, so no test question was trained.

    Raises:
        ConfigError: an unknown split or skill.
    """
    stream = _checked(random.Random(f"{seed} {split}"), skills, split)
    return [next(stream) for _ in range(n)]


def _checked(rng: random.Random, skills: Sequence[str] | None, split: Split) -> Iterator[Question]:
    """The stream of questions, once split and skills are known to exist."""
    if split not in ("train", "test"):
        raise ConfigError(f"split is {split!r}; expected 'train' or 'test'")
    names = list(skills or SKILLS)
    for name in names:
        if name not in SKILLS:
            raise ConfigError(f"unknown skill {name!r}; expected one of {', '.join(SKILLS)}{nearest(name, SKILLS)}")
    return _questions(rng, names, split)


def _questions(rng: random.Random, names: list[str], split: Split) -> Iterator[Question]:
    while True:
        question = SKILLS[rng.choice(names)](rng)
        if _is_test(question.question) == (split == "test"):
            yield question


def _is_test(question: str) -> bool:
    digest = hashlib.blake2b(question.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") < _TEST_SHARE * 2**32


def texts(
    n: int, *, seed: int = 0, split: Split = "train", skills: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """`n` documents, `text`: a few questions with their answers each, of all skills or of some.

    Raises:
        ConfigError: an unknown split or skill.
    """
    rng = random.Random(f"{seed} {split} texts")
    stream = _checked(rng, skills, split)
    return [
        {"text": "\n".join(f"{q.question} {q.answer}" for q in (next(stream) for _ in range(rng.randint(2, 5))))}
        for _ in range(n)
    ]


def chats(n: int, *, seed: int = 0, split: Split = "train") -> list[dict[str, Any]]:
    """`n` conversations of two to six questions: `messages`, `source` ("chat", or "tool" with a call) and `tools` then."""
    rng = random.Random(f"{seed} {split} chats")
    stream = _questions(rng, list(SKILLS), split)
    rows = []
    for _ in range(n):
        asked = [next(stream) for _ in range(rng.randint(2, 6))]
        messages: list[dict[str, Any]] = [{"role": "system", "content": SYSTEM}]
        for question in asked:
            messages += _exchange(question)
        calls = any(question.expression for question in asked)
        rows.append(
            {"messages": messages, "source": "tool" if calls else "chat", **({"tools": TOOLS} if calls else {})}
        )
    return rows


def _exchange(question: Question) -> list[dict[str, Any]]:
    asked: dict[str, Any] = {"role": "user", "content": question.question}
    answered: dict[str, Any] = {"role": "assistant", "content": question.answer}
    if not question.expression:
        return [asked, answered]
    function = {"name": "calculator", "arguments": {"expression": question.expression}}
    return [
        asked,
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]},
        {"role": "tool", "name": "calculator", "content": question.answer},
        answered,
    ]


def preferences(n: int, *, seed: int = 0, split: Split = "train") -> list[dict[str, Any]]:
    """`n` preference pairs, conversational `prompt`, `chosen` and `rejected`, and the right `answer`."""
    plain = [name for name in SKILLS if name != "multiplication"]
    return [
        {
            "prompt": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question.question}],
            "chosen": [{"role": "assistant", "content": question.answer}],
            "rejected": [{"role": "assistant", "content": question.wrong}],
            "answer": question.answer,
        }
        for question in questions(n, seed=seed, split=split, skills=plain)
    ]


def answer_reward(prompts: Sequence[Any], completions: Sequence[Any], answer: Sequence[str], **_: Any) -> list[float]:
    """1.0 for each completion that is the right answer to the letter, else 0.0; TRL's signature for reward functions.

    Args:
        prompts: not looked at.
        completions: texts, or conversations whose last message is the answer.
        answer: the right answers, a column of the dataset.
    """
    said = [one if isinstance(one, str) else one[-1]["content"] for one in completions]
    return [float(text.strip() == right) for text, right in zip(said, answer, strict=True)]


def write(folder: str | Path, *, n: int = 8000, n_test: int = 400, seed: int = 0) -> Path:
    """Write the corpus as JSON lines, `chats`, `texts` and `preferences` of both splits, as a user's own files would be."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    sizes: dict[Split, int] = {"train": n, "test": n_test}
    for split, size in sizes.items():
        for name, build in (("chats", chats), ("texts", texts), ("preferences", preferences)):
            rows = build(size, seed=seed, split=split)
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (folder / f"{name}_{split}.jsonl").write_text(lines)
    return folder
