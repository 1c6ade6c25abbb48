"""The tables and the picture of a search, from results written by hand."""

from __future__ import annotations

import pytest
from matplotlib.image import imread
from rich.console import Console

from hf_objectives.mixture import COMBINED, LAWS, MEAN
from hf_objectives.recipes.mixture_search import plot, print_tables


@pytest.fixture
def results():
    shares = [0.2, 0.5, 0.8]
    losses = {
        "trials": [3.0, 2.5, 2.0],
        "natural": {"predicted": [2.5, 0.1], "measured": [2.4, 2.6]},
        "recommended": {"predicted": [2.1, 0.2], "measured": [2.0, 2.1]},
    }
    law = {"law": next(iter(LAWS)), "held_out": [2.9, 2.6, 2.1], "p_value": 0.04}
    return {
        "sources": ["web", "books"],
        "natural": [0.75, 0.25],
        "recommended": [0.4, 0.6],
        "recommended_error": [0.05, 0.05],
        "trials": [[1 - share, share] for share in shares],
        "evaluation": {
            "test": {**losses, **law, "weight": 2, "cv_rmse": dict.fromkeys((*LAWS, MEAN), 0.125)},
            COMBINED: {**losses, "weight": None},
        },
        "influential": {"source": 1, "shares": shares, "combined": [3.0, 2.5, 2.0]},
        "notes": ["two seeds are few"],
    }


def test_tables_say_shares_losses_and_how_well_a_law_holds(results, capsys):
    print_tables(results, Console(width=200))
    said = capsys.readouterr().out
    for figure in ("75.0%", "60.0%", "5.0%", "2.5000 ± 0.1000", "2.0500", "0.1250", "0.04", "Note: two seeds are few."):
        assert figure in said
    # (2.0 - 2.4 + 2.1 - 2.6) / 2, and its range
    assert "-0.4500" in said and "-0.5000 to -0.4000" in said


def test_results_without_checks_have_no_difference(results, capsys):
    for found in results["evaluation"].values():
        found["natural"] = found["recommended"] = {"predicted": [2.5, 0.1], "measured": []}
    print_tables(results, Console(width=200))
    assert " to " not in capsys.readouterr().out.split("Loss")[1].split("Error")[0]


@pytest.mark.slow
def test_the_picture_is_drawn(results, tmp_path):
    plot(results, tmp_path / "search.png")
    assert len({tuple(pixel) for pixel in imread(tmp_path / "search.png").reshape(-1, 4)[::97]}) > 3
