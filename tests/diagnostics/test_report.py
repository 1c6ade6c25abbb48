"""The report of a run as a file: what it holds, what it escapes, and how a browser shows it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hf_objectives.diagnostics import report as report_module
from hf_objectives.diagnostics.curves import Curves, Series, read_curves
from hf_objectives.diagnostics.report import write_report
from hf_objectives.errors import FileFormatError
from hf_objectives.inspection.findings import SEVERITIES, Finding

HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror='window.hacked=2'>"


def healthy(name: str = "base", steps: int = 400, slower: float = 1.0) -> Curves:
    """A loss that falls with noise, with validation, schedule and gradients."""
    at = np.arange(1, steps + 1)
    noise = np.random.default_rng(0).normal(0, 0.03, steps)
    loss = 2 + 3 * np.exp(-at / (60 * slower)) + noise
    held = at[49::50]
    return Curves(
        name,
        {
            "loss": Series(at, loss),
            "eval_loss": Series(held, 2.05 + 3 * np.exp(-held / (60 * slower))),
            "learning_rate": Series(at, 1e-3 * np.minimum(1, at / 20) * (1 - at / (steps + 1))),
            "grad_norm": Series(at, 1 + np.abs(noise)),
        },
    )


def spiking() -> Curves:
    curves = healthy()
    curves.get("loss").values[249:252] += np.array([3.0, 2.5, 1.0])
    return curves


def saved_run(folder: Path, source: str = "books", **environment: Any) -> Path:
    """An output folder with everything that a report shows, under hostile or harmless names."""
    folder.mkdir(parents=True)
    history = []
    for step in range(1, 61):
        shares = {f"mixture/{source}/share": 0.6, f"mixture/{source}/asked": 0.5, f"mixture/{source}/epochs": step / 40}
        history.append({"step": step, "loss": 4 - step / 30, **shares})
    history += [{"step": 30, "eval_loss": 3.2, f"eval_{source}_perplexity": 24.5}]
    history += [{"step": 60, "eval_loss": 2.1, f"eval_{source}_perplexity": 8.25}]
    history.sort(key=lambda line: line["step"])
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": history, "global_step": 60}))
    pieces = [[f"question {source}", False], [f"answer {source}", True]]
    (folder / "labels.json").write_text(json.dumps([{"source": source, "pieces": pieces}]))
    content = {"versions": {"torch": "2.0"}, "device": "cpu", "world_size": 2, "settings": {"seed": 1, **environment}}
    (folder / "environment.json").write_text(json.dumps(content))
    event = folder / "diagnostics" / "step_31_rank_0"
    event.mkdir(parents=True)
    examples = [{"source": source, "row": 7, "loss": 9.5, "text": f"text {source}"}]
    (event / "event.json").write_text(json.dumps({"step": 31, "kind": "spike", "loss": 9.5, "examples": examples}))
    return folder


@pytest.fixture
def text_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Writes a report without its pictures, which take most of the time, and gives its text."""
    monkeypatch.setattr(report_module, "draw_panels", lambda runs, findings: [])
    return lambda run, **options: write_report(run, tmp_path / "out" / "r.html", **options).read_text(encoding="utf-8")


def test_a_folder_is_shown_whole(tmp_path: Path, text_of: Callable[..., str]) -> None:
    run = saved_run(tmp_path / "base", learning_rate=0.25)
    text = text_of(run)
    assert "<h1>base</h1>" in text
    assert '<th scope="row">books</th><td>50.00%</td><td>60.00%</td><td>1.5</td>' in text
    assert '<th scope="row">books</th><td>24.5</td><td>8.25</td><td>8.25</td><td>60</td>' in text
    assert "question books<mark>answer books</mark>" in text
    assert (
        "step 31: <bdi>spike</bdi>, loss <bdi>9.5</bdi>" in text
        and "<bdi>books</bdi>, row <bdi>7</bdi>, loss <bdi>9.5</bdi>" in text
    )
    assert '<th scope="row">learning_rate</th><td>0.25</td>' in text
    assert '<th scope="row">world size</th><td>2</td>' in text


def test_a_finding_stands_with_its_evidence_and_advice(text_of: Callable[..., str]) -> None:
    text = text_of(spiking())
    card = re.search(r'<article class="finding (\w+)">(.*?)</article>', text, re.S)
    assert card is not None and "spike_recovered" in card[2] and f">{card[1]}</span>" in card[2]
    assert re.search(r"<p>[^<]*\d[^<]*</p>\s*<p class=\"advice\">[^<]{20,}</p>", card[2])
    assert int(re.search(r"spike_recovered, steps (\d+) to", card[2])[1]) in range(248, 253)  # type: ignore[index]


def test_a_comparison_names_the_settings_that_differ_only(tmp_path: Path, text_of: Callable[..., str]) -> None:
    ours, theirs = saved_run(tmp_path / "a", warmup=10), saved_run(tmp_path / "b", warmup=99, optim="sgd")
    text = text_of(ours, compare=theirs)
    table = text[text.index('id="differences"') : text.index('id="environment"')]
    assert '<th scope="row">warmup</th><td>10</td><td>99</td>' in table
    assert '<th scope="row">optim</th><td>not set</td><td>sgd</td>' in table
    assert "seed" not in table


def test_characters_that_steer_are_shown_as_pictures(tmp_path: Path, text_of: Callable[..., str]) -> None:
    run = saved_run(tmp_path / "base", "a\u202eb\x1b[31m", note="\x00\u2066", learning_rate="1\n2")
    text = text_of(run)
    assert not set(text) & {"\u202e", "\x1b", "\x00", "\u2066"}
    assert "question a\ufffdb\u241b[31m" in text and "1\n2" in text
    assert "<bdi>a\ufffdb\u241b[31m</bdi>, row <bdi>7</bdi>" in text  # data between our words stands by itself


def test_the_reference_of_preferences_is_no_source(text_of: Callable[..., str]) -> None:
    keys = ("chosen", "rejected", "reference_chosen", "reference_rejected")
    log = [{"step": i, "loss": 0.6, **{f"eval_{key}_perplexity": 5.0 for key in keys}} for i in (1, 2)]
    text = text_of(log)
    assert re.findall(r'<th scope="row">(\w+)</th><td>5', text[text.index('id="sources"') :]) == ["chosen", "rejected"]


def test_validation_sets_of_a_trainer_are_sources(text_of: Callable[..., str]) -> None:
    log = [{"step": i, "loss": 2.0, "eval_wiki_loss": float(np.log(8 / i))} for i in (1, 2)]
    text = text_of(log)
    row = "<bdi>wiki</bdi>, exp(loss)</th><td>8</td><td>4</td><td>4</td><td>2</td>"
    assert row in text


def test_a_log_without_a_panel_says_so(text_of: Callable[..., str]) -> None:
    text = text_of([{"step": i, "speed": 2.0} for i in (1, 2, 3)])
    assert "no curve that is drawn" in text and "<svg" not in text


def test_half_a_surrogate_pair_can_be_written(tmp_path: Path, text_of: Callable[..., str]) -> None:
    run = saved_run(tmp_path / "base", note="x\ud800y")
    assert "x?y" in text_of(run)


def test_one_step_is_reported_without_findings(text_of: Callable[..., str]) -> None:
    text = text_of([{"step": 1, "loss": 2.0}])
    assert "findings need at least two" in text


@pytest.mark.parametrize(
    ("log", "said"),
    [
        ([{"step": i, "reward": 1.0 + i % 2} for i in range(30)], "the log has no training loss to judge"),
        (
            [{"step": i, "loss": 3.0 - i / 10} for i in range(9)],
            "too few points to judge most things (9; 20 are needed)",
        ),
        (healthy(), "Nothing is wrong that a log can show."),
    ],
)
def test_what_it_means_that_nothing_was_found(text_of: Callable[..., str], log: Any, said: str) -> None:
    text = text_of(log)
    assert said in text[: text.index('id="curves"')] and '<article class="finding' not in text


def test_a_folder_without_a_log_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match=r"no log in .*expected trainer_state\.json"):
        write_report(tmp_path, tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_figures_tell_extremes_and_leave_out_what_is_not_finite(text_of: Callable[..., str]) -> None:
    log = [{"step": i, "loss": loss} for i, loss in enumerate([4.0, float("nan"), 9.0, 1.5, 2.0, float("inf")], 1)]
    text = text_of(log)
    cells = ("Loss", 6, 4, 2, 1.5, 4, 9, 3)  # points, first, last, least and its step, greatest and its step
    assert '<th scope="row">training</th>' + "".join(f"<td>{cell}</td>" for cell in cells) in text


# -- in a browser --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_hostile_text_shows_and_does_not_run(tmp_path: Path, browser_page: Any) -> None:
    ours, theirs = saved_run(tmp_path / "a", HOSTILE, note=HOSTILE), saved_run(tmp_path / "b", HOSTILE, other=HOSTILE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report_module, "read_curves", lambda run: replace(read_curves(run), name=f"{run.name} {HOSTILE}"))
        path = write_report(ours, tmp_path / "r.html", compare=theirs)
    text = path.read_text(encoding="utf-8")
    assert not re.search("<(img|script)", text) and text.count("&lt;img src=x onerror=") >= 7
    page = browser_page.open(path)
    assert page.evaluate("window.hacked") is None and page.locator("img, script").count() == 0
    assert HOSTILE in page.inner_text("#labels pre")
    assert page.locator("svg text").get_by_text("</script>").count() > 0  # in legends
    assert browser_page.errors == [] and browser_page.requests == []


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_in_either_scheme(tmp_path: Path, browser_context: Callable[..., Any], scheme: str) -> None:
    """No sideways scrolling, curves in the page's colours, and text with a contrast of 4.5:1 or more."""
    found = [Finding(f"kind {i}", 9 * i, severity, "e", "a") for i, severity in enumerate(SEVERITIES, 1)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report_module, "diagnose", lambda _: found)
        path = write_report(saved_run(tmp_path / "base", note="x" * 300), tmp_path / "r.html")
    tab = browser_context(color_scheme=scheme, viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True)
    page = tab.open(path)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    tick = page.locator("svg text").first
    assert tick.bounding_box()["height"] >= 8
    back = colour(page.locator("body"), "backgroundColor")
    assert (luminance(back) > 0.5) is (scheme == "light")
    assert contrast(colour(tick, "fill"), back) >= 4.5
    for severity, number in zip(page.locator(".severity").all(), page.locator(".number").all(), strict=True):
        assert contrast(colour(severity, "color"), colour(page.locator(".finding").first, "backgroundColor")) >= 4.5
        assert contrast(colour(number, "color"), colour(number, "backgroundColor")) >= 4.5
    assert tab.errors == [] and tab.requests == []


def colour(element: Any, name: str) -> str:
    return element.evaluate(f"(element) => getComputedStyle(element).{name}")


def contrast(*colours: str) -> float:
    dark, light = sorted(map(luminance, colours))
    return (light + 0.05) / (dark + 0.05)


def luminance(colour: str) -> float:
    """Relative luminance of rgb(r, g, b) as WCAG 2 defines it."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
