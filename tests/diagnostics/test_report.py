"""The report of a run as a file: what it holds, what it escapes, and what it does in a browser."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hf_objectives.diagnostics import report as report_module
from hf_objectives.diagnostics.curves import Curves, Series
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


def ready(tab: Any, path: Path) -> Any:
    page = tab.open(path)
    page.wait_for_selector("#plots[data-ready]")
    return page


def until(page: Any, expression: str) -> None:
    """Wait for it to hold; Playwright's own wait evaluates text in the page, which the page's policy forbids."""
    for _ in range(100):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"not within 5 s: {expression}")


FIGURES = "Bokeh.documents[0].roots()[0].children"


def test_a_folder_is_shown_whole(tmp_path: Path) -> None:
    run = saved_run(tmp_path / "base", learning_rate=0.25)
    text = write_report(run, tmp_path / "out" / "report.html").read_text(encoding="utf-8")
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


def test_a_finding_stands_with_its_evidence_and_advice(tmp_path: Path) -> None:
    text = write_report(spiking(), tmp_path / "report.html").read_text(encoding="utf-8")
    card = re.search(r'<article class="finding (\w+)">(.*?)</article>', text, re.S)
    assert card is not None and "spike_recovered" in card[2] and f">{card[1]}</span>" in card[2]
    assert re.search(r"<p>[^<]*\d[^<]*</p>\s*<p class=\"advice\">[^<]{20,}</p>", card[2])
    assert int(re.search(r'data-from="(\d+)"', card[2])[1]) in range(248, 253)  # type: ignore[index]


def test_a_comparison_names_the_settings_that_differ_only(tmp_path: Path) -> None:
    ours, theirs = saved_run(tmp_path / "a", warmup=10), saved_run(tmp_path / "b", warmup=99, optim="sgd")
    text = write_report(ours, tmp_path / "r.html", compare=theirs).read_text(encoding="utf-8")
    table = text[text.index('id="differences"') : text.index('id="environment"')]
    assert '<th scope="row">warmup</th><td>10</td><td>99</td>' in table
    assert '<th scope="row">optim</th><td>not set</td><td>sgd</td>' in table
    assert "seed" not in table


def test_hostile_text_is_escaped_everywhere(tmp_path: Path) -> None:
    ours = saved_run(tmp_path / "a", HOSTILE, note=HOSTILE)
    theirs = saved_run(tmp_path / "b", HOSTILE, other=HOSTILE)
    text = write_report(ours, tmp_path / "r.html", compare=theirs).read_text(encoding="utf-8")
    assert "<img" not in text and "<script>window" not in text
    assert text.count("&lt;img src=x onerror=") >= 7
    assert text.count("</script>") == 3


def test_broken_side_files_are_notes(tmp_path: Path) -> None:
    run = saved_run(tmp_path / "base")
    (run / "labels.json").write_text('[{"pieces": 3}]')
    (run / "environment.json").write_text("{")
    text = write_report(run, tmp_path / "r.html").read_text(encoding="utf-8")
    assert "environment.json cannot be read" in text and "labels.json holds" in text


@pytest.mark.parametrize("depth", [200, 100_000])
def test_a_side_file_that_is_nested_too_deep_is_a_note(tmp_path: Path, depth: int) -> None:
    run = saved_run(tmp_path / "base")
    (run / "labels.json").write_text("[" * depth + "]" * depth)
    text = write_report(run, tmp_path / "r.html").read_text(encoding="utf-8")
    notes = re.search(r"Notes on what was read \(1\).*?</ul>", text, re.S)
    assert notes is not None and "labels.json" in notes[0]


def test_characters_that_steer_are_shown_as_pictures(tmp_path: Path) -> None:
    run = saved_run(tmp_path / "base", "a\u202eb\x1b[31m", note="\x00\u2066", learning_rate="1\n2")
    text = write_report(run, tmp_path / "r.html").read_text(encoding="utf-8")
    page = text[: text.index('<script type="application/json"')]
    assert not set(page) & {"\u202e", "\x1b", "\x00", "\u2066"}
    drawn = text[text.index('id="figures">') :].split("</script>")[0]
    assert "a\\ufffdb\\u241b[31m" in drawn and "\\u202e" not in drawn and "\\u001b" not in drawn
    assert "question a\ufffdb\u241b[31m" in page and "1\n2" in page
    assert "<bdi>a\ufffdb\u241b[31m</bdi>, row <bdi>7</bdi>" in page  # data between our words stands by itself


def test_the_reference_of_preferences_is_no_source(tmp_path: Path) -> None:
    keys = ("chosen", "rejected", "reference_chosen", "reference_rejected")
    log = [{"step": i, "loss": 0.6, **{f"eval_{key}_perplexity": 5.0 for key in keys}} for i in (1, 2)]
    text = write_report(log, tmp_path / "r.html").read_text(encoding="utf-8")
    assert re.findall(r'<th scope="row">(\w+)</th><td>5', text[text.index('id="sources"') :]) == ["chosen", "rejected"]


def test_validation_sets_of_a_trainer_are_sources(tmp_path: Path) -> None:
    log = [{"step": i, "loss": 2.0, "eval_wiki_loss": float(np.log(8 / i))} for i in (1, 2)]
    text = write_report(log, tmp_path / "r.html").read_text(encoding="utf-8")
    row = "<bdi>wiki</bdi>, exp(loss)</th><td>8</td><td>4</td><td>4</td><td>2</td>"
    assert row in text and "Validation perplexity by source, exp(loss)" in text


def test_a_log_without_a_panel_says_so(tmp_path: Path, browser_page: Any) -> None:
    path = write_report([{"step": i, "speed": 2.0} for i in (1, 2, 3)], tmp_path / "r.html")
    page = browser_page.open(path)
    page.wait_for_selector("#plots[data-ready]", state="attached")
    assert "no curve that is drawn" in page.inner_text("#curves") and browser_page.errors == []


def test_an_event_of_which_nothing_is_trained_says_so(tmp_path: Path) -> None:
    (tmp_path / "trainer_state.json").write_text(
        json.dumps({"log_history": [{"step": i, "loss": 3 - 0.1 * i} for i in range(9)]})
    )
    event = tmp_path / "diagnostics" / "step_3_rank_0"
    event.mkdir(parents=True)
    examples = [
        *({"source": "a", "row": 1, "loss": None, "tokens": 0, "text": "masked"} for _ in range(12)),
        {"source": "b", "row": 2, "loss": "nan", "tokens": 4, "text": "broken"},
    ]
    (event / "event.json").write_text(
        json.dumps({"step": 3, "kind": "non_finite", "loss": "nan", "examples": examples})
    )
    page = write_report(tmp_path, tmp_path / "report.html").read_text()
    assert "<bdi>a</bdi>, row <bdi>1</bdi>, no token trained" in page and "loss <bdi>None" not in page
    assert "<bdi>b</bdi>, row <bdi>2</bdi>, loss <bdi>nan</bdi>" in page


def test_half_a_surrogate_pair_can_be_written(tmp_path: Path) -> None:
    run = saved_run(tmp_path / "base", note="x\ud800y")
    assert "x?y" in write_report(run, tmp_path / "r.html").read_text(encoding="utf-8")


def test_one_step_is_reported_without_findings(tmp_path: Path) -> None:
    text = write_report([{"step": 1, "loss": 2.0}], tmp_path / "r.html").read_text(encoding="utf-8")
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
def test_what_it_means_that_nothing_was_found(tmp_path: Path, log: Any, said: str) -> None:
    text = write_report(log, tmp_path / "r.html").read_text(encoding="utf-8")
    assert said in text[: text.index('id="curves"')] and '<article class="finding' not in text


def test_a_folder_without_a_log_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match=r"no log in .*expected trainer_state\.json"):
        write_report(tmp_path, tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_a_million_steps_stay_small_and_keep_a_spike(tmp_path: Path, browser_page: Any) -> None:
    curves = healthy(steps=1_000_000)
    curves.get("loss").values[654_320] = 77.5
    path = write_report(curves, tmp_path / "r.html")
    assert path.stat().st_size < 5e6
    page = ready(browser_page, path)
    assert page.evaluate(f"Math.max(...{FIGURES}[0].renderers[0].data_source.get('y'))") == 77.5
    assert page.evaluate(f"{FIGURES}[0].renderers[0].data_source.get('y').length") <= 2400


def test_curves_are_drawn_and_switch_without_error_or_request(tmp_path: Path, browser_page: Any) -> None:
    page = ready(browser_page, write_report(spiking(), tmp_path / "r.html", compare=healthy("other", slower=2)))
    blue = f"""() => {{
        const find = (root) => [...root.querySelectorAll("canvas")].concat(
            [...root.querySelectorAll("*")].flatMap((e) => e.shadowRoot ? find(e.shadowRoot) : []));
        return find(document).some((c) => {{
            if (!c.width || !c.height) return false;
            const d = c.getContext("2d").getImageData(0, 0, c.width, c.height).data;
            for (let i = 0; i < d.length; i += 4)
                if (d[i] === 0 && d[i+1] === 114 && d[i+2] === 178 && d[i+3] > 200) return true;
            return false;
        }}) && {FIGURES}.length > 3;
    }}"""
    until(page, blue)
    inked = "r.glyph.line_alpha.value > 0"
    shown = f"{FIGURES}[0].renderers.filter((r) => r.visible && {inked} && r.tags.includes('%s')).length"
    for mode, raw, smooth in (("raw", 2, 0), ("smooth", 0, 2), ("both", 2, 2)):
        page.click(f"button[data-mode={mode}]")
        assert page.evaluate(shown % "raw") == raw and page.evaluate(shown % "smooth") == smooth
        assert page.get_attribute(f"button[data-mode={mode}]", "aria-pressed") == "true"
    scales = f"{FIGURES}.filter((f) => f.visible && f.tags.includes('switches')).map((f) => f.tags[0])"
    for scale in ("log", "linear"):
        page.click(f"button[data-scale={scale}]")
        assert set(page.evaluate(scales)) == {scale}
    page.wait_for_timeout(300)
    assert browser_page.errors == [] and browser_page.requests == []


def test_the_log_scale_spans_the_curve(tmp_path: Path, browser_page: Any) -> None:
    page = ready(browser_page, write_report(healthy(), tmp_path / "r.html"))
    page.click("button[data-scale=log]")
    until(page, f"{FIGURES}[1].y_range.start > 1 && {FIGURES}[1].y_range.end < 10")
    assert page.evaluate(f"{FIGURES}[1].y_range.start < {FIGURES}[1].y_range.end")


def test_keyboard_and_findings_move_all_curves(tmp_path: Path, browser_page: Any) -> None:
    page = ready(browser_page, write_report(spiking(), tmp_path / "r.html"))
    span = f"[{FIGURES}[0].x_range.start, {FIGURES}[0].x_range.end]"
    whole = page.evaluate(span)
    page.focus("#plots")
    page.keyboard.press("+")
    start, end = page.evaluate(span)
    assert end - start == pytest.approx((whole[1] - whole[0]) / 2)
    page.keyboard.press("ArrowRight")
    assert page.evaluate(span)[0] > start
    page.keyboard.press("0")
    assert page.evaluate(span) == pytest.approx(whole)
    page.focus(".finding button.show")
    page.keyboard.press("Enter")
    start, end = page.evaluate(span)
    assert start < 250 < end and end - start < (whole[1] - whole[0]) / 2
    assert page.evaluate(f"{FIGURES}.every((f) => f.x_range === {FIGURES}[0].x_range)")
    assert "Steps" in page.inner_text("#range")


def test_wheel_zooms_with_control_and_hover_tells_values(tmp_path: Path, browser_page: Any) -> None:
    page = ready(browser_page, write_report(healthy(), tmp_path / "r.html"))
    page.locator("#plots").scroll_into_view_if_needed()
    box = page.locator("#plots").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 120)
    page.mouse.move(box["x"] + box["width"] / 2 + 5, box["y"] + 125)
    page.locator("span[data-value]").get_by_text("training", exact=True).wait_for()
    width = f"{FIGURES}[0].x_range.end - {FIGURES}[0].x_range.start"
    before = page.evaluate(width)
    page.keyboard.down("Control")
    page.mouse.wheel(0, -300)
    page.keyboard.up("Control")
    until(page, f"{width} < {before}")
    assert browser_page.errors == [] and browser_page.requests == []


def test_hostile_text_shows_and_does_not_run(tmp_path: Path, browser_page: Any) -> None:
    ours = saved_run(tmp_path / "a", HOSTILE, note=HOSTILE)
    page = ready(browser_page, write_report(ours, tmp_path / "r.html", compare=saved_run(tmp_path / "b", HOSTILE)))
    page.locator("#plots").hover(position={"x": 400, "y": 150})
    page.wait_for_timeout(200)
    assert page.evaluate("window.hacked") is None and page.locator("img").count() == 0
    assert HOSTILE in page.inner_text("#labels pre")
    assert browser_page.errors == [] and browser_page.requests == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_in_either_scheme(tmp_path: Path, browser_context: Callable[..., Any], scheme: str) -> None:
    tab = browser_context(color_scheme=scheme, viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True)
    run = saved_run(tmp_path / "base", note="x" * 300)
    page = ready(tab, write_report(run, tmp_path / "r.html"))
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    light = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).every((part) => part > 128)"
    assert page.evaluate(light) is (scheme == "light")
    text = page.evaluate(f"{FIGURES}[0].title.text_color")
    assert (int(text[1:3], 16) > 128) is (scheme == "dark")
    page.emulate_media(color_scheme="dark" if scheme == "light" else "light")
    until(page, f"{FIGURES}[0].title.text_color !== '{text}'")
    assert tab.errors == []


def test_zooming_fits_the_values_that_are_seen(tmp_path: Path, browser_page: Any) -> None:
    at = np.arange(1, 401)
    tail = Curves("tail", {"loss": Series(at, 2 + 30 * np.exp(-at / 10))})
    page = ready(browser_page, write_report(tail, tmp_path / "r.html"))
    ends = f"[{FIGURES}[0].y_range.start, {FIGURES}[0].y_range.end]"
    page.click("button[data-mode=raw]")
    until(page, f"{FIGURES}[0].y_range.end > 25 && {FIGURES}[0].y_range.start < 2")
    page.evaluate(f"{FIGURES}[0].x_range.setv({{start: 100, end: 200}})")
    until(page, f"{FIGURES}[0].y_range.end < 3")
    # From 2 + 30 exp(-20) to 2 + 30 exp(-10), and a twentieth about it.
    most = 30 * np.exp(-10)
    assert page.evaluate(ends) == pytest.approx([2 - 0.05 * most, 2 + 1.05 * most], rel=1e-6)
    log = f"{FIGURES}.find((f) => f.tags[0] === 'log' && f.tags[1] === 'perplexity')"
    page.click("button[data-scale=log]")
    until(page, f"{log}.y_range.end < 9")  # exp(2) is 7.4
    ticks = page.evaluate(f"{log}.left[0].ticker.ticks")
    assert len(ticks) >= 2 and min(ticks) > 7 and max(ticks) < 9
    page.click("button[data-zoom=all]")
    until(page, f"{log}.y_range.end > 1e9")
    assert all(np.log10(tick) % 1 == 0 for tick in page.evaluate(f"{log}.left[0].ticker.ticks"))


def test_no_perplexity_below_one_is_on_an_axis(tmp_path: Path, browser_page: Any) -> None:
    log = [{"step": i, "loss": 0.3 / i} for i in range(1, 101)]
    page = ready(browser_page, write_report(log, tmp_path / "r.html"))
    starts = page.evaluate(f"{FIGURES}.filter((f) => f.tags[1] === 'perplexity').map((f) => f.y_range.start)")
    assert starts == [1, 1]


def test_what_the_legend_hides_stays_hidden(tmp_path: Path, browser_context: Callable[..., Any]) -> None:
    tab = browser_context(viewport={"width": 1280, "height": 2600})  # all of it, so that nothing scrolls
    page = ready(tab, write_report(healthy(), tmp_path / "r.html", compare=healthy("other", slower=2)))
    legend = f"{FIGURES}[0].center.find((part) => part.type === 'Legend')"
    inside = page.evaluate(f"(() => {{ const b = Bokeh.index.find_one({legend}).bbox; return [b.left, b.top]; }})()")
    page.locator("#plots").click(position={"x": inside[0] + 30, "y": inside[1] + 12})  # the first name
    own = f"{FIGURES}[%d].renderers.filter((r) => r.data_source === {FIGURES}[0].renderers[0].data_source)"
    until(page, f"{own % 0}.every((r) => !r.visible)")
    page.keyboard.press("Home")
    for mode in ("raw", "smooth", "both"):
        page.click(f"button[data-mode={mode}]")
        for figure in (0, 1):  # the loss on either scale
            assert page.evaluate(f"{FIGURES}[{figure}].tags[1]") == "loss"
            assert page.evaluate(f"{own % figure}.every((r) => !r.visible)")
            assert page.evaluate(f"{FIGURES}[{figure}].renderers.filter((r) => r.visible).length") >= 2
    assert tab.errors == []


def test_from_the_curves_it_is_one_tab_to_their_figures(tmp_path: Path, browser_page: Any) -> None:
    page = ready(browser_page, write_report(spiking(), tmp_path / "r.html", compare=healthy("other")))
    page.focus("a.skip.here")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "plots"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.closest('#in-figures') !== null")
    page.focus("a.skip.here")
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.closest('#in-figures') !== null")


def luminance(colour: str) -> float:
    """Relative luminance of #rrggbb as WCAG 2 defines it."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_names_of_findings_can_be_read(tmp_path: Path, browser_context: Callable[..., Any], scheme: str) -> None:
    found = [Finding(f"kind {i}", 9 * i, severity, "e", "a") for i, severity in enumerate(SEVERITIES, 1)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report_module, "diagnose", lambda _: found)
        path = write_report(healthy(), tmp_path / "r.html")
    tab = browser_context(color_scheme=scheme)
    page = ready(tab, path)
    labels = f"{FIGURES}[0].center.filter((part) => part.type === 'Label')"
    pairs = page.evaluate(f"{labels}.map((part) => [part.text_color, part.background_fill_color])")
    assert len({text for text, _ in pairs}) == 3
    for text, back in pairs:
        dark, light = sorted((luminance(text), luminance(back)))
        assert (light + 0.05) / (dark + 0.05) >= 4.5
    tones = page.evaluate("[...document.querySelectorAll('.severity')].map((e) => getComputedStyle(e).color)")
    rgb = [f"rgb({', '.join(str(int(text[i : i + 2], 16)) for i in (1, 3, 5))})" for text, _ in pairs]
    assert sorted(tones) == sorted(rgb)
