"""Which panels a log gets, and what is in them."""

from __future__ import annotations

import numpy as np
import pytest

from hf_objectives.diagnostics.curves import read_curves
from hf_objectives.diagnostics.panels import colour_of, panels_of


def run(*, name="run", steps=5, **values):
    curves = read_curves([{"step": i, **values} for i in range(1, steps + 1)])
    curves.name = name
    return curves


def named(*runs):
    return {panel.name: panel for panel in panels_of(list(runs))}


def labels(panel):
    return [line.label for line in panel.lines]


def test_only_what_the_log_has_is_drawn():
    assert list(named(run(loss=2.0))) == ["loss", "perplexity"]
    assert list(named(run(loss=2.0, perplexity=7.0, learning_rate=0.1, grad_norm=1.0, tokens_per_second=9.0))) == [
        "loss",
        "perplexity",
        "learning_rate",
        "grad_norm",
        "tokens_per_second",
    ]


def test_training_and_validation_of_one_run():
    loss = named(run(loss=2.0, eval_loss=3.0))["loss"]
    assert labels(loss) == ["training", "validation"]
    assert [line.held_out for line in loss.lines] == [False, True]
    assert loss.lines[0].colour != loss.lines[1].colour and loss.legend


def test_without_validation_there_is_no_line_of_it():
    assert labels(named(run(loss=2.0))["loss"]) == ["training"]


def test_several_runs_have_a_colour_each():
    loss = named(run(name="a", loss=2.0, eval_loss=3.0), run(name="b", loss=1.0))["loss"]
    assert labels(loss) == ["a", "a, validation", "b"] and not loss.legend
    assert loss.lines[0].colour == loss.lines[1].colour != loss.lines[2].colour


def test_perplexity_is_that_of_the_log_or_of_the_loss():
    given = named(run(loss=2.0, perplexity=5.0))["perplexity"]
    assert given.title == "Perplexity" and given.log and set(given.lines[0].series.values) == {5.0}
    made = named(run(loss=np.log(8.0), eval_loss=np.log(4.0)))["perplexity"]
    assert made.title == "Perplexity, exp(loss)"
    assert [line.series.values[0] for line in made.lines] == pytest.approx([8.0, 4.0])
    mixed = named(run(loss=2.0, perplexity=5.0), run(loss=np.log(8.0)))["perplexity"]
    assert [line.series.values[0] for line in mixed.lines] == pytest.approx([5.0, 8.0])


@pytest.mark.parametrize("key", ["rewards/chosen", "reward", "kl", "accuracy", "eval_rewards/margins"])
def test_a_loss_of_preferences_or_rewards_has_no_perplexity(key):
    assert "perplexity" not in named(run(loss=0.7, **{key: 0.5}))


def test_a_loss_that_is_never_finite_still_has_its_place():
    panels = named(run(loss=float("nan"), grad_norm=float("inf")))
    assert list(panels) == ["loss"] and panels["loss"].lines == []


def test_learning_rates_far_apart_are_on_a_log_scale():
    assert named(run(learning_rate=0.1, loss=1.0), run(learning_rate=0.001, loss=1.0))["learning_rate"].log
    assert not named(run(learning_rate=0.002, loss=1.0), run(learning_rate=0.001, loss=1.0))["learning_rate"].log
    assert not named(run(learning_rate=0.1, loss=1.0))["learning_rate"].log


def test_sources_of_one_run_share_a_panel():
    figures = {"eval_a_perplexity": 5.0, "eval_b_perplexity": 6.0, "eval_reference_chosen_perplexity": 2.0}
    shares = {"mixture/a/share": 0.7, "mixture/a/asked": 0.6, "mixture/b/share": 0.3}
    panels = named(run(loss=1.0, eval_perplexity=5.5, **figures, **shares))
    assert labels(panels["source"]) == ["a", "b"] and panels["source"].log
    share = panels["share"]
    assert [(line.label, line.series.values[0], line.style) for line in share.lines] == [
        ("a", 0.7, "-"),
        ("", 0.6, "--"),
        ("b", 0.3, "-"),
    ]
    assert share.share and share.lines[0].colour == share.lines[1].colour != share.lines[2].colour


def test_sources_of_several_runs_have_a_panel_each():
    panels = named(
        run(name="x", loss=1.0, eval_a_perplexity=5.0, eval_b_perplexity=6.0),
        run(name="y", loss=1.0, eval_a_perplexity=5.0),
    )
    assert panels["source"].title == "Perplexity, a" and labels(panels["source"]) == ["x", "y"]
    assert panels["source b"].title == "Perplexity, b" and labels(panels["source b"]) == ["x"]


def test_lone_points_are_not_compared():
    once = {"loss": 1.0, "eval_a_perplexity": 5.0}
    assert "source" in named(run(steps=1, **once))
    assert "source" not in named(run(steps=1, **once), run(steps=1, **once))


def test_of_many_sources_the_first_eight():
    (panel,) = [
        one for one in panels_of([run(loss=1.0, **{f"mixture/s{i}/share": 0.1 for i in range(10)})]) if one.share
    ]
    assert labels(panel) == [f"s{i}" for i in range(8)] and "the first 8 of 10" in panel.title


def test_colours_come_again_after_eight():
    assert len({colour_of(i) for i in range(8)}) == 8 and colour_of(8) == colour_of(0)
