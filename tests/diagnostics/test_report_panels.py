"""The curves of a report: SVG that takes the page's colours and holds no more than can be seen."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import numpy as np
import pytest

from hf_objectives.diagnostics.curves import Curves, Series
from hf_objectives.diagnostics.report import draw_panels
from hf_objectives.inspection import Finding


def curves(loss: list[float], name: str = "base", *more: str) -> Curves:
    series = Series(np.arange(1, len(loss) + 1), np.array(loss))
    return Curves(name, dict.fromkeys(("loss", *more), series))


FALLING = [3.0 - 0.1 * i for i in range(12)]


def drawn(*runs: Curves, findings: list[Finding] | None = None) -> dict[str, str]:
    return {title: str(svg) for title, svg in draw_panels(runs, findings or [])}


def texts(svg: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


def test_a_panel_is_named_and_takes_its_size_and_colours_from_the_page() -> None:
    panels = drawn(curves(FALLING, "base", "grad_norm"))
    assert list(panels) == ["Loss", "Perplexity, exp(loss) (log scale)", "Gradient norm"]
    for title, svg in panels.items():
        root = ElementTree.fromstring(svg.replace("xlink:href", "href"))
        assert root.attrib == {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": title}
        assert "currentColor" in svg and "var(--line)" in svg and "<style" not in svg and "#010203" not in svg
        ids = re.findall(r' id="([^"]*)"', svg)
        assert set(ids) == set(re.findall(r'(?:url\(#|href="#)([^")]*)', svg))  # those that are used


def test_the_same_log_gives_the_same_picture() -> None:
    assert drawn(curves(FALLING)) == drawn(curves(FALLING))


def test_a_finding_is_marked_by_its_number_where_it_is_seen() -> None:
    found = [Finding("gradient_explosion", 5, "error", "e", "a"), Finding("reward_hacking", 5, "warning", "e", "a", 7)]
    panels = drawn(curves(FALLING, "base", "grad_norm", "reward", "kl"), findings=found)
    marks = {title: re.findall(r"<text[^>]*var\(--back\)[^>]*>(\d)</text>", svg) for title, svg in panels.items()}
    assert [title for title, numbers in marks.items() if numbers == ["1"]] == ["Gradient norm"]
    assert [title for title, numbers in marks.items() if numbers == ["2"]] == ["Reward", "KL to the reference"]
    assert "var(--error)" in panels["Gradient norm"] and "var(--warning)" in panels["Reward"]


def test_a_run_that_is_nan_throughout_is_drawn_empty() -> None:
    assert list(drawn(curves([float("nan")] * 5))) == ["Loss"]


@pytest.mark.parametrize(
    "loss", [[2.0] * 5, [-1.0, -2.0, -3.0], [0.0, 0.0], [1.0, 705.0, 1e300], [1e-306, 1e300], [-1e300, 1e300]], ids=str
)
def test_a_constant_a_negative_and_a_huge_curve_are_drawn(loss: list[float]) -> None:
    assert "Loss" in next(iter(drawn(curves(loss))))


def test_names_in_legends_are_text_as_it_stands() -> None:
    names = ("$$x^2$$", "_b</text><script>", f"{'x' * 40}1")
    legend = texts(drawn(*(curves(FALLING, name) for name in names))["Loss"])[-3:]
    assert [name.strip() for name in legend] == ["$$x^2$$", "_b&lt;/text&gt;&lt;script&gt;", f"{'x' * 17}…{'x' * 16}1"]


@pytest.mark.slow
def test_a_million_steps_stay_small_and_keep_a_spike_of_one_step() -> None:
    at = np.arange(1, 1_000_001)
    loss = 2 + np.random.default_rng(0).normal(0, 0.03, len(at))
    loss[654_320] = 77.5
    (svg,) = (
        svg for title, svg in drawn(Curves("long", {"loss": Series(at, loss)})).items() if title.startswith("Loss")
    )
    assert len(svg) < 300_000
    paths = [np.array(re.findall(r"[ML] ([\d.]+) ([\d.]+)", path), float) for path in re.findall(r' d="([^"]*)"', svg)]
    raw = max(paths, key=len)
    x, height = raw[:, 0], raw[:, 1].max() - raw[:, 1]  # SVG counts down
    assert x[height.argmax()] == pytest.approx(x[0] + 0.65432 * (x[-1] - x[0]), abs=0.5)
    assert np.sort(height)[-2] < 0.1 * height.max()
