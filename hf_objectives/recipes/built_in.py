"""The built-in corpus by its names in recipes, and what a model answers to its questions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rich.table import Table

from hf_objectives import demo
from hf_objectives.errors import ConfigError
from hf_objectives.evaluation import wilson_interval
from hf_objectives.recipes.arguments import BUILT_IN
from hf_objectives.recipes.preview import figure, table

_ROWS: dict[str, Callable[..., list[dict[str, Any]]]] = {
    BUILT_IN: lambda n, **given: demo.chats(n, **given),
    f"{BUILT_IN}:careless": lambda n, **given: demo.chats(n, careless=demo.CARELESS, **given),
    f"{BUILT_IN}:texts": lambda n, **given: demo.texts(n, **given),
}
_EACH = 50  # questions of each skill in an exam


def is_built_in(path: str) -> bool:
    """Whether a path of a source is a name of the built-in corpus.

    Raises:
        ConfigError: a name that begins as they do and is none of them.
    """
    if path.split(":")[0] == BUILT_IN and path not in _ROWS:
        raise ConfigError(f"there is no {path!r}; the built-in corpus has {', '.join(_ROWS)}")
    return path in _ROWS


def built_in_rows(path: str, n: int, **given: Any) -> list[dict[str, Any]]:
    """`n` rows of the built-in corpus by its name; an annotator is careless in the training split alone."""
    if path == f"{BUILT_IN}:careless" and given.get("split") == "test":
        path = BUILT_IN
    return _ROWS[path](n, **given)


def pair_rows(
    name: str, counts: tuple[int, int], *, seed: int, skills: Sequence[str] | None = None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Built-in pairs to train on and to hold out, so many of some skills, each with its `source` and its number in `row`."""
    if name != BUILT_IN:
        raise ConfigError(
            f"dataset_name is {name!r}, which has no pairs and no prompts of its own; expected {BUILT_IN!r}"
        )
    given: dict[str, Any] = {"seed": seed, "skills": skills}
    parts = (demo.preferences(counts[0], **given), demo.preferences(counts[1], split="test", **given))
    train, held_out = ([{**row, "source": BUILT_IN, "row": i} for i, row in enumerate(part)] for part in parts)
    return train, held_out


def watched_rows(name: str, path: str) -> list[dict[str, Any]]:
    """Held-out rows whose perplexity is watched; "builtin" are texts or chats by the name that they have there."""
    named = {"texts": f"{BUILT_IN}:texts", "chats": BUILT_IN}
    if path == BUILT_IN and name not in named:
        raise ConfigError(f"lm_datasets: {name!r} is 'builtin'; the built-in corpus has {' and '.join(named)}")
    return built_in_rows(named[name] if path == BUILT_IN else path, 200, split="test")


@dataclass
class Marks:
    """What a model answered to an exam of as many questions of every skill.

    Attributes:
        unseen: each question of the test split with the answer.
        trained: the same of the training split, in the order in which `demo.chats` asks; empty where it was not asked.
    """

    unseen: list[tuple[demo.Question, str]]
    trained: list[tuple[demo.Question, str]] = field(default_factory=list)

    @classmethod
    def of(cls, model: Any, tokenizer: Any, *, seed: int, each: int = _EACH, trained: bool = False) -> Marks:
        """Ask a model; `seed` is that of the training rows, and `trained` asks the questions of the training split too."""
        splits: tuple[Literal["test", "train"], ...] = ("test", "train") if trained else ("test",)
        exams = (demo.exam(each, seed=seed, split=split) for split in splits)
        return cls(*(demo.exact_match(model, tokenizer, exam)[1] for exam in exams))

    def figures(self) -> dict[str, float]:
        """`exact_match` of unseen questions with its 95 % interval (Wilson 1927), `exact_match_trained` where those of the
        training split were asked, and `exact_match_facts`.

        Skills of facts are in the last alone: their few questions are answered by heart.
        """
        facts = [is_right(*answer) for answer in self.unseen if answer[0].skill in demo.FACTS]
        tried, trained = (
            [is_right(*answer) for answer in answers if answer[0].skill not in demo.FACTS]
            for answers in (self.unseen, self.trained)
        )
        low, high = wilson_interval(sum(tried), len(tried))
        return {
            "exact_match": _mean(tried),
            "exact_match_low": low,
            "exact_match_high": high,
            **({"exact_match_trained": _mean(trained)} if trained else {}),
            "exact_match_facts": _mean(facts),
        }

    def by_skill(self) -> dict[str, dict[str, float]]:
        """Of each skill the share of right answers to unseen questions, their number and the interval; and the share of the
        training split where that was asked.
        """
        tried, trained = _by_skill(self.unseen), _by_skill(self.trained)
        return {
            skill: {
                "exact_match": _mean(right),
                "num_questions": len(right),
                **dict(zip(("low", "high"), wilson_interval(sum(right), len(right)), strict=True)),
                **({"trained": _mean(trained[skill])} if trained else {}),
            }
            for skill, right in tried.items()
        }

    def table(self) -> Table:
        """The marks of each skill."""
        rows = []
        for skill, marks in self.by_skill().items():
            kind = " (facts)" if skill in demo.FACTS else " (hard)" if skill in demo.HARD else ""
            interval = f"{marks['low']:.2f} to {marks['high']:.2f}"
            rows.append((skill + kind, f"{marks['exact_match']:.2f}", interval, figure(marks.get("trained"))))
        return table("Exact match, by skill", ("", "unseen questions", "95 % interval", "training split"), rows)


def is_right(question: demo.Question, said: str) -> bool:
    """Whether an answer is right to the letter; where a calculator is needed, its call is the answer."""
    return said == demo.expected(question)


def _by_skill(answers: Iterable[tuple[demo.Question, str]]) -> dict[str, list[bool]]:
    marks: dict[str, list[bool]] = defaultdict(list)
    for question, said in answers:
        marks[question.skill].append(is_right(question, said))
    return marks


def _mean(right: list[bool]) -> float:
    return sum(right) / len(right)
