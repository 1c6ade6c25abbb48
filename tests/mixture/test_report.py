"""Reports: what was counted is what is said, at any row, after an end and after a resume."""

from __future__ import annotations

import itertools
import json
from collections import Counter

import pytest

from tests.support.mixtures import LENGTHS, mixture, of_kind, taken


def pieces_of(row) -> tuple[list, list]:
    """Source and length of each piece."""
    if "sources" in row:
        return row["sources"], row["seq_lengths"]
    return [row["source"]], [len(row["input_ids"])]


@pytest.mark.slow
def test_the_report_is_what_was_counted(kind):
    made = of_kind(kind)
    tokens, examples = Counter(), Counter()
    for n, row in enumerate(itertools.islice(made, 500)):
        if n in (0, 1, 63, 256, 400):
            report = made.report(n)
            assert {one.name: one.tokens for one in report} == {name: tokens[name] for name in "abc"}
            if kind != "concat":  # documents of b are cut in two, and count once where they are drawn
                names = "ac" if "across" in kind else "abc"
                assert [report[name].examples for name in names] == [examples[name] for name in names]
            assert sum(one.asked for one in report) == pytest.approx(1) and report.row == n
        for name, length in zip(*pieces_of(row), strict=True):
            tokens[name] += length
            examples[name] += 1
    if kind == "tokens":
        assert [one.epochs for one in made.report(500)] == pytest.approx(
            [sum(1 for r in taken(made, 500) if r[0] == name) / LENGTHS[name][0] for name in "abc"]
        )
        assert "after 500 rows, shares of tokens" in str(made.report(500)) and "60.0" in str(made.report(500))
        assert made.report(500)["a"].share == pytest.approx(0.6, abs=0.01)
        assert made.report(500).metrics()["mixture/a/tokens"] == made.report(500)["a"].tokens


@pytest.mark.parametrize("streams", [False, True])
def test_a_report_after_the_end_and_after_a_resume(streams):
    made = mixture({"unit": "examples"}, streams=streams, max_epochs={"a": 1, "b": 1, "c": 1})
    taken(made, 100)
    assert made.report(72).row == 72 and made.report(72)["a"].examples == 40
    if not streams:
        assert made.report(500).to_dict() == made.report(72).to_dict()
    resumed = mixture({"unit": "examples"}, streams=streams, max_epochs={"a": 1, "b": 1, "c": 1})
    resumed.load_state_dict(json.loads(json.dumps(made.state_dict(72))))
    known = resumed.report()  # of streams, up to the begin of a block, until they are read
    rows = taken(mixture({"unit": "examples"}, streams=streams, max_epochs={"a": 1, "b": 1, "c": 1}), 100)
    counted = Counter(name for name, _ in rows[: known.row])
    assert {one.name: one.examples for one in known} == counted and (streams or known.row == 72)
