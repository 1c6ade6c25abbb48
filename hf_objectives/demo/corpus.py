"""The corpus: questions of the skills as text, chats with a tool, preference pairs and a reward; split by question."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from hf_objectives.demo.skills import FACTS, HARD, SKILLS, Question
from hf_objectives.types import check_one_of

Split = Literal["train", "test"]
#: The system message of conversations with a tool; the others have none.
SYSTEM = "Use the calculator for products."
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
#: A careless annotator: the share of wrong answers in skills that the model could do. Alignment is there to mend this.
CARELESS: Mapping[str, float] = {"sorting": 0.75, "reversing": 0.75, "spelling": 0.75}
_TEST_SHARE = 0.15
_PLAIN = tuple(name for name in SKILLS if name != "multiplication")  # answered without a tool
_JUDGED = tuple(name for name in _PLAIN if name not in (*HARD, *FACTS))  # what a tiny model can work out


def questions(n: int, *, seed: int = 0, split: Split = "train", skills: Sequence[str] | None = None) -> list[Question]:
    """`n` questions of a split. The text of a question decides its split, so no test question was trained.

    Raises:
        ConfigError: an unknown split or skill.
    """
    return list(itertools.islice(_stream(random.Random(f"{seed} {split}"), split, skills), n))


def exam(each: int, *, seed: int = 0, split: Split = "test", skills: Sequence[str] | None = None) -> list[Question]:
    """`each` distinct questions of every skill, or of some; of a skill of facts, fewer where it has no more.

    Of the training split they are those that `chats` of this seed ask first.

    Raises:
        ConfigError: an unknown split or skill.
    """
    asked: list[Question] = []
    for name in skills or SKILLS:
        stream = _stream(random.Random(f"{seed} exam"), split, [name])
        if split == "train":
            stream = (q for talk in _conversations(seed, split) for q in talk if q.skill == name)
        distinct: dict[str, Question] = {}
        for question in itertools.islice(stream, 20 * each):
            distinct[question.question] = question
            if len(distinct) == each:
                break
        asked += distinct.values()
    return asked


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
    """`n` documents (`text`) of two to five questions, each answer in a line of its own; facts are told in other words.

    Args:
        skills: those to write about; all that need no tool by default.

    Raises:
        ConfigError: an unknown split or skill.
    """
    rng = random.Random(f"{seed} {split} texts")
    stream = _stream(rng, split, skills or _PLAIN)
    return [
        {
            "text": "\n".join(
                q.fact or f"{q.question}\n{q.answer}" for q in (next(stream) for _ in range(rng.randint(2, 5)))
            )
        }
        for _ in range(n)
    ]


def _conversations(seed: int, split: Split) -> Iterator[list[Question]]:
    """The questions of each conversation, without end."""
    rng = random.Random(f"{seed} {split} chats")
    stream = _stream(rng, split)
    return ([next(stream) for _ in range(rng.randint(1, 4))] for _ in itertools.count())


def chats(
    n: int, *, seed: int = 0, split: Split = "train", careless: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """`n` conversations of two to six questions: `messages` and `source`, "chat" or, with `tools` and a call, "tool".

    Args:
        careless: by the name of a skill, the share of answers that are wrong, such as `CARELESS`; none by default.

    Raises:
        ConfigError: an unknown split, or an unknown skill of `careless`.
    """
    for name in careless or ():
        check_one_of("careless", name, SKILLS)
    slips = random.Random(f"{seed} {split} careless")
    rows = []
    for asked in itertools.islice(_conversations(seed, split), n):
        calls = any(question.expression for question in asked)
        messages: list[dict[str, Any]] = [{"role": "system", "content": SYSTEM}] if calls else []
        for question in asked:
            is_wrong = slips.random() < (careless or {}).get(question.skill, 0.0)
            messages += _exchange(question, question.wrong if is_wrong else question.answer)
        rows.append(
            {"messages": messages, "source": "tool" if calls else "chat", **({"tools": TOOLS} if calls else {})}
        )
    return rows


def _exchange(question: Question, answer: str) -> list[dict[str, Any]]:
    asked: dict[str, Any] = {"role": "user", "content": question.question}
    answered: dict[str, Any] = {"role": "assistant", "content": answer}
    if not question.expression:
        return [asked, answered]
    function = {"name": "calculator", "arguments": {"expression": question.expression}}
    return [
        asked,
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]},
        {"role": "tool", "name": "calculator", "content": question.answer},
        answered,
    ]


def preferences(
    n: int, *, seed: int = 0, split: Split = "train", skills: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """`n` preference pairs: `prompt`, `chosen` and `rejected` as messages, the right `answer` and the `skill`.

    Args:
        skills: those to ask for; by default all that need no tool and are neither `HARD` nor `FACTS`.

    Raises:
        ConfigError: an unknown split or skill.
    """
    return [
        {
            "prompt": [{"role": "user", "content": question.question}],
            "chosen": [{"role": "assistant", "content": question.answer}],
            "rejected": [{"role": "assistant", "content": question.wrong}],
            "answer": question.answer,
            "skill": question.skill,
        }
        for question in questions(n, seed=seed, split=split, skills=skills or _JUDGED)
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
