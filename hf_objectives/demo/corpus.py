"""The corpus: questions of the skills as text, chats with a tool, preference pairs and a reward; split by question."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from hf_objectives.demo.skills import SKILLS, Question
from hf_objectives.types import check_one_of

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
    """`n` questions of a split. The text of a question decides its split, so no test question was trained.

    Raises:
        ConfigError: an unknown split or skill.
    """
    return list(itertools.islice(_stream(random.Random(f"{seed} {split}"), split, skills), n))


def _stream(rng: random.Random, split: Split, skills: Sequence[str] | None = None) -> Iterator[Question]:
    """Questions without end; split and skills are checked at once."""
    check_one_of("split", split, ("train", "test"))
    names = list(skills or SKILLS)
    for name in names:
        check_one_of("skill", name, SKILLS)
    drawn = (SKILLS[rng.choice(names)](rng) for _ in itertools.count())
    return (question for question in drawn if _is_test(question.question) == (split == "test"))


def _is_test(question: str) -> bool:
    digest = hashlib.blake2b(question.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") < _TEST_SHARE * 2**32


def texts(
    n: int, *, seed: int = 0, split: Split = "train", skills: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """`n` documents (`text`) of two to five questions with their answers, of all skills or of some.

    Raises:
        ConfigError: an unknown split or skill.
    """
    rng = random.Random(f"{seed} {split} texts")
    stream = _stream(rng, split, skills)
    return [
        {"text": "\n".join(f"{q.question} {q.answer}" for q in (next(stream) for _ in range(rng.randint(2, 5))))}
        for _ in range(n)
    ]


def chats(n: int, *, seed: int = 0, split: Split = "train") -> list[dict[str, Any]]:
    """`n` conversations of two to six questions: `messages` and `source`, "chat" or, with `tools` and a call, "tool"."""
    rng = random.Random(f"{seed} {split} chats")
    stream = _stream(rng, split)
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
    """`n` preference pairs: `prompt`, `chosen` and `rejected` as messages, and the right `answer`."""
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
    """The reward of each completion: 1.0 for the right answer to the letter, else 0.0. The signature is TRL's.

    Args:
        prompts: not used.
        completions: texts, or conversations whose last message is the answer.
        answer: the right answers, a column of the dataset.
    """
    said = [completion if isinstance(completion, str) else completion[-1]["content"] for completion in completions]
    return [float(text.strip() == right) for text, right in zip(said, answer, strict=True)]


def write(folder: str | Path, *, n: int = 8000, n_test: int = 400, seed: int = 0) -> Path:
    """Write `chats`, `texts` and `preferences` of both splits as JSON lines, as a user's own files would be."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    sizes: dict[Split, int] = {"train": n, "test": n_test}
    for split, size in sizes.items():
        for name, build in (("chats", chats), ("texts", texts), ("preferences", preferences)):
            rows = build(size, seed=seed, split=split)
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (folder / f"{name}_{split}.jsonl").write_text(lines)
    return folder
