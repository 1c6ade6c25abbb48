"""Training curves from any place that a log can be, one run or several, with what is wrong marked."""

from __future__ import annotations

import json
import re
from itertools import pairwise

import numpy as np
import pytest

from hf_objectives.diagnostics import plot as drawing
from hf_objectives.diagnostics.curves import Curves, Series, read_curves
from hf_objectives.diagnostics.plot import plot_training_metrics
from hf_objectives.errors import ConfigError, FileFormatError
from hf_objectives.inspection.findings import Finding

LOG = [
    {"step": i, "loss": 3 - i / 30, "perplexity": 9.0, "learning_rate": 1e-3, "grad_norm": 1.0} for i in range(1, 41)
]
EVALUATED = [
    *LOG,
    {"step": 40, "eval_loss": 2.0, "eval_perplexity": 7.4, "eval_a_perplexity": 8.0, "eval_b_perplexity": 7.0},
]
STARTS = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}


def finding(kind="spike_recovered", step=20, severity="warning", **more):
    return Finding(kind, step, severity, more.pop("evidence", "loss 2 to 9"), "look at the batch", **more)


@pytest.fixture
def draw(monkeypatch, tmp_path):
    """Draws, and gives matplotlib's figure in place of a file."""

    def run(log, **settings):
        kept = []
        monkeypatch.setattr(drawing, "save", lambda figure, output: kept.append(figure))
        plot_training_metrics(log, tmp_path / "curves.png", **settings)
        (figure,) = kept
        return figure

    return run


def panels(figure):
    return {axes.get_title(loc="left"): axes for axes in figure.axes if axes.get_title(loc="left")}


def words(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ending", "log"),
    [
        ("png", LOG[:1]),
        ("svg", EVALUATED),
        ("pdf", [{"step": 1, "eval_loss": 2.0}]),
        ("png", [{"step": i, "loss": 0.0} for i in range(30)]),
    ],
)
def test_draws_whatever_the_log_has(tmp_path, log, ending):
    path = plot_training_metrics(log, tmp_path / "deep" / f"curves.{ending}")
    assert path == tmp_path / "deep" / f"curves.{ending}"
    assert path.read_bytes().startswith(STARTS[ending])


def test_raw_values_lie_pale_under_their_trend(draw):
    rng = np.random.default_rng(0)
    losses = 2 + rng.normal(0, 0.1, 200)
    log = [{"step": i, "loss": loss} for i, loss in enumerate(losses)] + [{"step": 199, "eval_loss": 2.5}]
    raw, trend, validation = panels(draw(log, findings=[]))["Loss"].lines
    assert raw.get_ydata().tolist() == losses.tolist() and raw.get_alpha() < 0.5
    assert np.std(trend.get_ydata()[20:]) < 0.5 * np.std(losses) and trend.get_color() == raw.get_color()
    assert validation.get_ydata().tolist() == [2.5] and validation.get_linestyle() == "--"
    assert trend.get_linestyle() == "-"


def test_without_validation_nothing_speaks_of_it(draw):
    loss = panels(draw(LOG, findings=[]))["Loss"]
    assert loss.get_legend() is None and not any(line.get_linestyle() == "--" for line in loss.lines)


def test_panels_and_scales(draw):
    drawn = panels(draw(EVALUATED, findings=[]))
    assert list(drawn) == [
        "Loss",
        "Perplexity (log scale)",
        "Learning rate",
        "Gradient norm",
        "Validation perplexity by source (log scale)",
    ]
    assert [axes.get_yscale() for axes in drawn.values()] == ["linear", "log", "linear", "linear", "log"]
    assert len({axes.get_xlim() for axes in drawn.values()}) == 1


def test_no_axis_counts_parts_of_a_step(draw):
    axes = panels(draw(LOG[:1], findings=[]))["Loss"]
    assert [tick for tick in axes.get_xticks() if 0.5 <= tick <= 1.5] == [1]


def test_a_loss_that_leaps_by_decades_is_on_a_log_scale(draw):
    log = [{"step": i, "loss": 1e6 if i > 25 else 2.0} for i in range(30)]
    assert panels(draw(log, findings=[]))["Loss (log scale)"].get_yscale() == "log"


def test_steps_that_are_not_finite_are_gaps(draw):
    log = [{"step": i, "loss": float("nan") if i == 3 else float("inf") if i == 7 else 2.0} for i in range(10)]
    (line,) = panels(draw(log, findings=[]))["Loss"].lines
    assert np.flatnonzero(np.isnan(line.get_ydata())).tolist() == [3, 7]


def test_several_runs_by_name_by_path_and_as_curves(draw, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").write_text(json.dumps({"log_history": EVALUATED}))
    curves = [read_curves(tmp_path / "a"), read_curves(tmp_path / "b")]
    for log in (
        {"a": EVALUATED, "b": tmp_path / "b"},
        [tmp_path / "a", str(tmp_path / "b")],
        tmp_path,
        curves,
    ):
        (legend,) = draw(log, findings=[]).legends
        assert [text.get_text() for text in legend.get_texts()] == ["a", "b", "validation"]
    (legend,) = draw([LOG, tmp_path / "a", LOG], findings=[]).legends
    assert [text.get_text() for text in legend.get_texts()] == ["run 1", "a", "run 3", "validation"]


@pytest.mark.slow
def test_findings_are_marked_where_they_are(draw):
    figure = draw(
        LOG,
        findings=[
            finding(step=20, last_step=25),
            finding("schedule_fault", 5, "info", evidence="the rate leaps"),
            finding("gradient_explosion", 30, "error", evidence="norm 900"),
        ],
    )
    marks = {
        title: [(text.get_text(), text.get_position()[0]) for text in axes.texts]
        for title, axes in panels(figure).items()
    }
    assert marks == {
        "Loss": [("2", 20)],
        "Perplexity (log scale)": [],
        "Learning rate": [("3", 5)],
        "Gradient norm": [("1", 30)],
    }
    listed = [text for text in words(figure) if ":" in text]
    assert listed == [
        "1  gradient_explosion (step 30): norm 900",
        "2  spike_recovered (steps 20 to 25): loss 2 to 9",
        "3  schedule_fault (step 5): the rate leaps",
    ]


def test_where_its_panel_is_missing_a_finding_is_marked_at_the_loss(draw):
    log = [{"step": i, "loss": 2.0} for i in range(30)]
    axes = panels(draw(log, findings=[finding("gradient_explosion", 7)]))["Loss"]
    assert [text.get_text() for text in axes.texts] == ["1"]


def test_findings_at_one_step_do_not_hide_each_other(draw):
    axes = panels(draw(LOG, findings=[finding(step=step) for step in (20, 20, 21, 22, 23, 24)]))["Loss"]
    places = [text.get_position() for text in axes.texts]
    for i, (x, y) in enumerate(places):
        assert not [one for one in places[:i] if abs(one[0] - x) < 2 and one[1] == y]


def test_a_constant_perplexity_has_an_axis(draw):
    log = [{"step": i, "loss": 2.0, "perplexity": 9.0} for i in range(1, 41)]
    low, high = panels(draw(log, findings=[]))["Perplexity (log scale)"].get_ylim()
    assert low < 8.9 and high > 9.1


def test_many_findings_are_counted(draw):
    said = words(draw(LOG, findings=[finding(step=i) for i in range(1, 31)]))
    assert said[-1] == "and 22 more"


def test_long_evidence_is_cut(draw):
    said = words(draw(LOG, findings=[finding(evidence="word " * 400)]))
    assert len(said) == 3 and said[-1].endswith("...")


def test_by_default_it_marks_what_diagnose_finds(draw):
    losses = 2 + 4 * np.arange(1, 201) ** -0.5 + np.random.default_rng(0).normal(0, 0.02, 200)
    losses[120:] += 3
    log = [{"step": i + 1, "loss": loss} for i, loss in enumerate(losses)]
    assert any(re.match(r"1  spike_sustained \(steps 121 to 200\)", text) for text in words(draw(log)))
    assert words(draw(log, findings=[])) == []
    both = words(draw({"$x": log, "fine": LOG}, findings=None))
    assert any(re.match(r"1  spike_sustained \(\$x, steps 121", text) for text in both)


@pytest.mark.slow
def test_names_are_not_read_as_mathematics(tmp_path):
    path = plot_training_metrics({"$a$ _b": LOG, "_c$": LOG}, tmp_path / "curves.svg", findings=[])
    assert path.stat().st_size > 10_000


def test_resumed_runs_show_their_seams(draw):
    run = Curves("run", read_curves(LOG).series, seams=[17])
    lines = panels(draw(run, findings=[]))["Loss"].lines
    assert [line.get_xdata() for line in lines if line.get_linestyle() == ":"] == [[17, 17]]


@pytest.mark.slow
def test_a_million_points_keep_their_extremes(draw):
    n = 1_000_000
    losses = np.random.default_rng(0).normal(3, 0.1, n)
    losses[654_321], losses[123_456] = 9.0, 0.5
    raw = panels(draw(Curves("long", {"loss": Series(np.arange(n), losses)}), findings=[]))["Loss"].lines[0]
    assert len(raw.get_xdata()) <= 2400
    assert raw.get_ydata().max() == 9.0 and raw.get_ydata().min() == 0.5
    assert raw.get_xdata()[raw.get_ydata().argmax()] == 654_321


@pytest.mark.parametrize("name", ["curves.gif", "curves", "curves.png.tmp"])
def test_other_endings_are_refused_before_anything_is_read(tmp_path, name):
    with pytest.raises(ConfigError, match=r"ends in \.png, \.svg, \.pdf; found"):
        plot_training_metrics(tmp_path / "none", tmp_path / name)


@pytest.mark.parametrize(
    ("log", "said"),
    [
        ([{"step": 1}], "no curve could be read"),
        (
            [{"step": 1, "speed": 2.0}],
            "neither a 'loss' nor an 'eval_loss', nor anything else that is drawn; it has speed",
        ),
        ([], "no log was given"),
        ({}, "no log was given"),
        ({"a": LOG, "b": [{"step": 1, "speed": 2.0}]}, "b has neither"),
        ([1, 2], "entry 0 of the log is 1; expected a mapping"),
        (7, "7 is no log; expected a path"),
        ({"step": 1, "loss": 2.0}, "1 is no log; expected a path"),
    ],
)
def test_logs_with_nothing_to_draw_are_refused(tmp_path, log, said):
    with pytest.raises(FileFormatError, match=said):
        plot_training_metrics(log, tmp_path / "curves.png")
    assert not list(tmp_path.iterdir())


def test_what_reinforcement_learning_is_judged_by_is_drawn_without_a_loss(draw):
    log = [{"step": i, "reward": i / 9, "kl": 0.1, "entropy": 2.0, "completions/mean_length": 90} for i in range(1, 31)]
    kinds = ("reward_hacking", "entropy_collapse", "length_growth", "spike_recovered")
    drawn = panels(draw(log, findings=[finding(kind, step=20 + i) for i, kind in enumerate(kinds)]))
    assert {title: [text.get_text() for text in axes.texts] for title, axes in drawn.items()} == {
        "Reward": ["1", "4"],  # where nothing shows it, in the first
        "KL to the reference": ["1"],
        "Entropy": ["2"],
        "Tokens of an answer": ["3"],
    }


def test_a_fall_of_the_chosen_is_marked_where_it_is_seen(draw):
    log = [{"step": i, "loss": 0.6, "rewards/margins": 0.1, "logps/chosen": -50.0 - i} for i in range(1, 31)]
    drawn = panels(draw(log, findings=[finding("falling_chosen")]))
    assert [title for title, axes in drawn.items() if axes.texts] == ["Log-probability of the chosen answers (nats)"]


@pytest.mark.slow
def test_many_runs_leave_room_for_their_names_and_their_findings(draw):
    runs = {f"{'a long name ' * 5}{i}": LOG for i in range(40)}
    figure = draw(runs, findings=[finding(step=i, last_step=i + 9, run=f"run {i}") for i in range(1, 13)])
    figure.set_dpi(130)  # as it is saved
    figure.draw_without_rendering()
    figure.canvas.draw()
    (legend,) = figure.legends
    boxes = [axes.get_window_extent() for axes in panels(figure).values()]
    assert min(box.height for box in boxes) > 2 * figure.dpi  # a panel is three inches with its title
    assert legend.get_window_extent().y0 >= max(box.y1 for box in boxes)
    lines = [text.get_window_extent() for axes in figure.axes for text in axes.texts if ":" in text.get_text()]
    assert len(lines) > 5
    assert all(above.y0 >= below.y1 - 1 for above, below in pairwise(lines))


def test_bands_of_many_runs_are_left_out(draw):
    for count, bands in ((16, 1), (17, 0)):
        log = [{"step": i, "loss": 2.0} for i in range(1, 31)]
        axes = panels(draw({str(i): log for i in range(count)}, findings=[finding(step=5, last_step=20)]))["Loss"]
        assert len(axes.patches) == bands and [text.get_text() for text in axes.texts] == ["1"]


def test_runs_of_one_colour_have_other_dashes(draw):
    lines = panels(draw({str(i): LOG for i in range(24)}, findings=[]))["Learning rate"].lines
    assert len({(line.get_color(), str(line._dash_pattern)) for line in lines}) == 24


def test_long_names_are_cut_in_the_middle(draw):
    (legend,) = draw({f"{'x' * 80} seed {seed}": LOG for seed in (1, 2)}, findings=[]).legends
    assert [text.get_text() for text in legend.get_texts()] == [f"{'x' * 17}…{'x' * 10} seed {seed}" for seed in (1, 2)]


def test_no_perplexity_below_one_is_on_the_axis(draw):
    log = [{"step": i, "loss": 0.3 / i} for i in range(1, 101)]
    assert panels(draw(log, findings=[]))["Perplexity, exp(loss) (log scale)"].get_ylim()[0] == 1.0


def test_a_finding_has_the_report_s_colour(draw):
    found = [finding(severity=severity) for severity in ("error", "warning", "info")]
    axes = panels(draw(LOG, findings=found))["Loss"]
    assert [text.get_bbox_patch().get_facecolor()[:3] for text in axes.texts] == [
        pytest.approx([int(code[i : i + 2], 16) / 255 for i in (1, 3, 5)]) for code in ("#b3202a", "#8a5a00", "#0060a8")
    ]
