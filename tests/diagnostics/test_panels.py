"""Which panels a log gets, and what is in them."""

from __future__ import annotations

import numpy as np
import pytest

from hf_objectives.diagnostics.curves import read_curves
from hf_objectives.diagnostics.panels import (
    colour_of,
    dashes_of,
    panels_of,
    shortened,
    shown_in,
    sources_of,
    with_perplexities,
)


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
    assert loss.lines[0].colour != loss.lines[1].colour


def test_without_validation_there_is_no_line_of_it():
    assert labels(named(run(loss=2.0))["loss"]) == ["training"]


def test_several_runs_have_a_colour_each():
    loss = named(run(name="a", loss=2.0, eval_loss=3.0), run(name="b", loss=1.0))["loss"]
    assert labels(loss) == ["a", "a, validation", "b"]
    assert loss.lines[0].colour == loss.lines[1].colour != loss.lines[2].colour


def test_perplexity_is_that_of_the_log_or_of_the_loss():
    given = named(run(loss=2.0, perplexity=5.0))["perplexity"]
    assert given.title == "Perplexity" and given.log and set(given.lines[0].series.values) == {5.0}
    made = named(run(loss=np.log(8.0), eval_loss=np.log(4.0)))["perplexity"]
    assert made.title == "Perplexity, exp(loss)"
    assert [line.series.values[0] for line in made.lines] == pytest.approx([8.0, 4.0])
    mixed = named(run(loss=2.0, perplexity=5.0), run(loss=np.log(8.0)))["perplexity"]
    assert [line.series.values[0] for line in mixed.lines] == pytest.approx([5.0, 8.0])


@pytest.mark.parametrize(
    "key", ["rewards/chosen", "reward", "kl", "margin", "eval_margin", "eval_reward", "eval_rewards/margins"]
)
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
    assert [(line.label, line.series.values[0], bool(line.dashes)) for line in share.lines] == [
        ("a", 0.7, False),
        ("", 0.6, True),
        ("b", 0.3, False),
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


@pytest.mark.parametrize("key", ["accuracy", "eval_accuracy", "eval_reward_bench_loss", "mean_token_accuracy"])
def test_an_accuracy_of_tokens_leaves_the_perplexity(key):
    assert "perplexity" in named(run(loss=2.0, **{key: 0.4}))


def test_each_perplexity_that_is_missing_is_made_and_named():
    for given, title in (
        ({"perplexity": 9.0}, "Perplexity, exp(loss) for validation"),
        ({"eval_perplexity": 5.0}, "Perplexity, exp(loss) for training"),
        ({"perplexity": 9.0, "eval_perplexity": 5.0}, "Perplexity"),
    ):
        panel = named(run(loss=np.log(8.0), eval_loss=np.log(4.0), **given))["perplexity"]
        assert panel.title == title and labels(panel) == ["training", "validation"]
        expected = [given.get("perplexity", 8.0), given.get("eval_perplexity", 4.0)]
        assert [line.series.values[0] for line in panel.lines] == pytest.approx(expected)
    some = named(run(name="a", loss=2.0, perplexity=5.0), run(name="b", loss=2.0))["perplexity"]
    assert some.title == "Perplexity, exp(loss) for b"
    many = [run(name=str(i), loss=2.0) for i in range(3)]
    title = named(run(name="a", loss=2.0, perplexity=5.0), *many)["perplexity"].title
    assert title == "Perplexity, exp(loss) for 3 of 4 lines"


def test_validation_sets_of_a_trainer_are_drawn_as_sources():
    sets = {
        "eval_wiki_loss": np.log(4.0),
        "eval_code_loss": np.log(2.0),
        "eval_aux_loss": 9.0,
        "eval_wiki_runtime": 3.0,
    }
    panels = named(run(loss=1.0, eval_loss=1.0, **sets))
    assert list(panels) == ["loss", "perplexity", "source"]
    assert panels["source"].title == "Validation perplexity by source, exp(loss)"
    assert [(line.label, line.series.values[0]) for line in panels["source"].lines] == [
        ("code", pytest.approx(2.0)),
        ("wiki", pytest.approx(4.0)),
    ]
    mixed = named(run(loss=1.0, eval_code_perplexity=3.0, **sets))["source"]
    assert mixed.title.endswith(", exp(loss) for wiki")
    assert [line.series.values[0] for line in mixed.lines] == pytest.approx([3.0, 4.0])


def test_sets_of_preferences_show_their_loss():
    panels = named(run(loss=0.7, eval_a_loss=0.5, eval_b_loss=0.6, **{"rewards/margins": 0.1}))
    assert "source" not in panels and labels(panels["set"]) == ["a", "b"]
    assert panels["set"].title == "Validation loss by source" and panels["set"].lines[1].series.values[0] == 0.6


def test_what_was_made_is_told_from_the_log():
    completed = with_perplexities(run(loss=2.0, eval_perplexity=3.0, eval_loss=1.0))
    assert completed.made == {"perplexity"} and completed.get("eval_perplexity").values[0] == 3.0


def test_sources_are_not_the_reference_of_preferences():
    keys = ("chosen", "rejected", "reference_chosen", "reference_rejected", "reference_books")
    curves = run(**{f"eval_{key}_perplexity": 2.0 for key in keys}, eval_perplexity=2.0)
    assert sources_of([curves], "eval_", "_perplexity") == ["chosen", "reference_books", "rejected"]


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        ("falling_chosen", "logps/chosen"),
        ("falling_chosen", "logps_change/chosen"),
        *(("reward_hacking", key) for key in ("reward", "objective/scores", "rewards/mean", "kl", "objective/kl")),
        ("reward_hacking", "kl_per_answer"),
        ("entropy_collapse", "entropy"),
        ("entropy_collapse", "policy/entropy_avg"),
        ("length_growth", "completions/mean_length"),
        ("length_growth", "completion_length"),
    ],
)
def test_what_a_finding_speaks_of_has_a_panel(kind, key):
    panels = named(run(loss=0.7, **{key: 0.5}))
    (name,) = shown_in(kind, panels)
    assert [line.series.values[0] for line in panels[name].lines] == [0.5]
    assert shown_in(kind, ["loss"]) == ["loss"] and shown_in(kind, ["share"]) == ["share"]


def test_a_log_without_a_loss_has_no_panel_of_it():
    assert list(named(run(reward=1.0))) == ["reward"] and list(named(run(speed=1.0))) == []


def test_each_round_of_colours_has_its_dashes():
    assert dashes_of(7) == () and len({dashes_of(8 * i, broken=broken) for i in range(4) for broken in (0, 1)}) == 8


def test_short_names_stay_apart():
    start = "SmolLM2-135M-Instruct-sft-lora-r16-lr"
    assert shortened(["a", f"{start}1e-4", f"{start}1e-5", "a"]) == [
        "a",
        "SmolLM2-135M-Inst…t-lora-r16-lr1e-4",
        "SmolLM2-135M-Inst…t-lora-r16-lr1e-5",
        "a",
    ]
    alike = [f"{'x' * 30}{i}{'y' * 30}" for i in range(3)]
    short = f"{'x' * 17}…{'y' * 17}"
    assert shortened(alike) == [short, f"{short} (2)", f"{short} (3)"]
