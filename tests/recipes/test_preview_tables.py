"""Tables of figures: what stands in which row."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from hf_objectives.recipes.preview import figure, figures_table


def rows(table: Table) -> list[list[str]]:
    return [list(cells) for cells in zip(*(column.cells for column in table.columns), strict=True)]


def test_figures():
    values = (None, float("nan"), 0, 12_345, 0.0, 1.23456, 999_999.0, 1.5e6)
    assert [figure(value) for value in values] == ["-", "-", "0", "12,345", "0", "1.235", "1e+06", "1.50e+06"]


def test_perplexities_come_first_with_their_tokens_and_then_the_named_figures():
    rate = {"eval_rate": 0.5, "eval_rate_low": 0.4, "eval_rate_high": 0.6}
    before = {"eval_perplexity": 9.0, "eval_a_b_perplexity": 8.0, **rate}
    tokens = {"eval_num_tokens": 1234.0, "eval_a_b_num_tokens": 7}
    change = {"eval_a_b_perplexity_increase": -0.5}
    after = {**dict.fromkeys(before, 0.25), **tokens, **change, "eval_other": 1.0, "eval_chosen_perplexity": 3.0}
    found = figures_table(
        before, after, {"eval_rate": "rate", "eval_missing": "missing", "eval_chosen_perplexity": "chosen"}
    )
    assert rows(found) == [
        ["perplexity", "1,234", "9", "0.25"],
        ["perplexity, a_b", "7", "8", "0.25 (-50.0%)"],
        ["rate", "", "0.5", "0.25"],
        ["  95 % interval", "", "0.400 to 0.600", "0.250 to 0.250"],
        ["chosen", "", "-", "3"],
    ]
    assert str(found.title) == "Held out, before and after"


def test_without_tokens_there_is_no_column_for_them():
    found = figures_table({}, {"eval_reward": 1.0, "eval_num_pairs": 1200.0}, {"eval_reward": "mean reward"})
    assert rows(found) == [["mean reward", "-", "1"]] and str(found.title).startswith("1,200 held-out pairs")
    Console(quiet=True).print(found)
