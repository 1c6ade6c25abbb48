"""The built-in corpus by its names in recipes, and what a model answers to its questions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from hf_objectives import demo
from hf_objectives.errors import ConfigError
from hf_objectives.evaluation import wilson_interval
from hf_objectives.recipes.arguments import BUILT_IN
from hf_objectives.recipes.preview import table

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
    name = path if given.get("split", "train") == "train" or path != f"{BUILT_IN}:careless" else BUILT_IN
    return _ROWS[name](n, **given)


def watched_rows(name: str, path: str) -> list[dict[str, Any]]:
    """Held-out rows whose perplexity is watched; "builtin" are texts or chats by the name that they have there."""
    named = {"texts": f"{BUILT_IN}:texts", "chats": BUILT_IN}
    if path == BUILT_IN and name not in named:
        raise ConfigError(f"lm_datasets: {name!r} is 'builtin'; the built-in corpus has {' and '.join(named)}")
    return built_in_rows(named[name] if path == BUILT_IN else path, 200, split="test")


@dataclass
class Marks:
    """What a model answered to an exam: as many questions of every skill, of which it may have seen some.

    Attributes:
        unseen, seen: each question with the answer.
    """

    unseen: list[tuple[demo.Question, str]]
    seen: list[tuple[demo.Question, str]]

    @classmethod
    def of(cls, model: Any, tokenizer: Any, *, seed: int = 0, each: int = _EACH) -> Marks:
        """Ask the questions of both splits; `seed` is that of the training rows."""
        unseen, seen = (
            demo.exact_match(model, tokenizer, demo.exam(each, seed=seed, split=split))[1]
            for split in ("test", "train")
        )
        return cls(unseen, seen)

    def figures(self) -> dict[str, float]:
        """`exact_match` of unseen questions with its 95 % interval (Wilson 1927), of seen ones, and of the skills of facts.

        Skills of facts are in the last alone: their few questions are answered by heart.
        """
        tried = [is_right(*answer) for answer in self.unseen if answer[0].skill not in demo.FACTS]
        low, high = wilson_interval(sum(tried), len(tried))
        seen = [is_right(*answer) for answer in self.seen if answer[0].skill not in demo.FACTS]
        facts = [is_right(*answer) for answer in self.unseen if answer[0].skill in demo.FACTS]
        return {
            "exact_match": _mean(tried),
            "exact_match_low": low,
            "exact_match_high": high,
            "exact_match_seen": _mean(seen),
            "exact_match_facts": _mean(facts),
        }

    def by_skill(self) -> dict[str, dict[str, float]]:
        """Of each skill the share of right answers to unseen questions, their number, and the share of seen ones."""
        tried, seen = _by_skill(self.unseen), _by_skill(self.seen)
        return {
            skill: {
                "exact_match": _mean(right),
                "num_questions": len(right),
                **dict(zip(("low", "high"), wilson_interval(sum(right), len(right)), strict=True)),
                "seen": _mean(seen[skill]),
            }
            for skill, right in tried.items()
        }

    def table(self) -> Table:
        """The marks of each skill."""
        rows = []
        for skill, marks in self.by_skill().items():
            kind = " (facts)" if skill in demo.FACTS else " (hard)" if skill in demo.HARD else ""
            interval = f"{marks['low']:.2f} to {marks['high']:.2f}"
            rows.append((skill + kind, f"{marks['exact_match']:.2f}", interval, f"{marks['seen']:.2f}"))
        return table("Exact match, by skill", ("", "unseen questions", "95 % interval", "seen ones"), rows)


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
