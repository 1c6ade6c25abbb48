"""The page of an inspection: what it holds, and what a browser makes of it."""

from __future__ import annotations

import re

import orjson
import pytest

from hf_objectives import demo
from hf_objectives.inspection.page import page_data, write_page
from hf_objectives.inspection.rows import inspect_rows

EVIL = "</script><script>window.broken = 1</script><img src=x onerror='window.broken = 1'> 日本 👩"


@pytest.fixture(scope="module")
def tokenizer():
    return demo.build_tokenizer()


@pytest.fixture(scope="module")
def inspection(tokenizer):
    evil = {
        "messages": [{"role": "user", "content": EVIL}, {"role": "assistant", "content": EVIL}],
        "source": "<b>evil",
    }
    rows = [*demo.chats(20), evil, evil]
    return inspect_rows(rows, tokenizer, max_length=400, packing=True)


@pytest.fixture
def page_file(inspection, tokenizer, tmp_path):
    return write_page(inspection, tmp_path / "pages" / "labels.html", tokenizer)


def test_the_data_spell_every_row(inspection, tokenizer):
    data = page_data(inspection, tokenizer)
    for shown, row in zip(data["examples"], inspection.examples, strict=True):
        pieces = [data["pieces"][i] for i in shown["p"]]
        assert [i for piece in pieces for i in piece[1]] == row.input_ids.tolist()
        flags = [bool(k % 2) for k, run in enumerate(shown["m"]) for _ in range(run)]
        assert flags == [token.trained for token in row.tokens]


def test_text_from_data_is_no_markup(page_file):
    html = page_file.read_text(encoding="utf-8")
    assert html.count("<script") == 2 and "<img" not in html and "<b>evil" not in html
    assert (
        not re.search(r"(src|href)=", html.split('id="data"')[0]) and "http://" not in html and "https://" not in html
    )
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)
    assert any("<" in piece[0] for piece in orjson.loads(data)["pieces"])


@pytest.mark.slow
def test_in_a_browser(page_file, browser_page):
    page = browser_page.open(page_file)
    assert page.locator("#tokens .on").count() > 0
    page.fill("#search", "onerror")
    assert page.inner_text("#head").startswith("1 of 2: <b>evil 20")
    assert EVIL in page.inner_text("#tokens") and page.locator("#tokens .found").count() >= 2
    assert page.evaluate("window.broken") is None
    page.fill("#search", "no such words")
    assert page.inner_text("#head") == "No row matches."
    page.fill("#search", "")
    page.locator("#head").click()
    page.keyboard.press("n")
    assert page.inner_text("#head").startswith("2 of 22: ")
    page.keyboard.press("p")
    assert page.inner_text("#head").startswith("1 of 22: ")
    page.focus("#tokens")
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#status").startswith('id 1  "<|im_start|>"') and "not trained" in page.inner_text("#status")
    page.locator("#tokens .on").first.click()
    assert page.inner_text("#status").endswith("  trained")
    page.click("#show-packed")
    assert "packed row 0" in page.inner_text("#head") and page.locator("#tokens .doc").count() >= 1
    page.click("text=show them")
    assert page.input_value("#filter") == "duplicates"
    assert browser_page.errors == [] and browser_page.requests == []


@pytest.mark.slow
def test_a_phone_in_the_dark(page_file, browser_context):
    tab = browser_context(color_scheme="dark", viewport={"width": 390, "height": 800}, has_touch=True)
    page = tab.open(page_file)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(13, 17, 23)"
    page.locator("#tokens .on").first.tap()
    assert page.inner_text("#status").endswith("  trained") and tab.errors == []


def chat(question: str, answer: str, **more) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **more}


def seen(page, selector: str) -> bool:
    """Whether nothing lies over an element, which may go over two lines."""
    script = """selector => {
      const found = document.querySelector(selector), lines = [...found.getClientRects()].filter(line => line.width > 1);
      return lines.every(line => document.elementFromPoint(line.left + line.width / 2, line.top + line.height / 2) === found);
    }"""
    return page.evaluate(script, selector)


@pytest.fixture
def long_page(tokenizer, tmp_path):
    """Two rows of some ten thousand tokens, the first with two needles far behind, the second with one."""
    hay = "one two three four five six seven "
    rows = [
        chat(hay * 900 + " needle " + hay * 30, "needle"),
        chat(hay * 901, "a needle"),
        chat("short", "hay"),
    ]
    found = inspect_rows(rows, tokenizer, max_length=30_000, show_tokens=300_000)
    assert len(found.examples[0].input_ids) > 9_000
    return write_page(found, tmp_path / "long.html", tokenizer)


@pytest.mark.slow
def test_a_search_shows_what_is_far_behind_and_goes_on(long_page, browser_page):
    page = browser_page.open(long_page)
    page.fill("#search", "needle")
    assert page.inner_text("#head").startswith("1 of 2: data 0") and "place 1 of 2" in page.inner_text("#head")
    assert page.locator("#tokens .here").count() == 1 and seen(page, "#tokens .here")
    page.press("#search", "Enter")
    assert "place 2 of 2" in page.inner_text("#head") and seen(page, "#tokens .here")
    assert "on" in page.get_attribute("#tokens .here", "class").split()  # the second is the answer
    page.press("#search", "Enter")
    assert page.inner_text("#head").startswith("2 of 2: data 1") and seen(page, "#tokens .here")
    page.press("#search", "Shift+Enter")
    assert page.inner_text("#head").startswith("1 of 2: data 0") and "place 2 of 2" in page.inner_text("#head")
    assert browser_page.errors == []


@pytest.mark.slow
@pytest.mark.parametrize("width", [1200, 390])
def test_the_token_at_the_keyboard_is_not_under_a_bar(long_page, browser_context, width):
    tab = browser_context(viewport={"width": width, "height": 600})
    page = tab.open(long_page)
    for by, key in ((1, "ArrowRight"), (-1, "ArrowLeft")):
        page.evaluate(f"for (let k = 0; k < 1500; k++) step({by})")
        page.focus("#tokens")
        page.keyboard.press(key)
        assert seen(page, "#tokens .at")
    assert tab.errors == []


@pytest.mark.slow
def test_characters_that_cannot_be_seen_are_shown(tokenizer, tmp_path, browser_page):
    hidden = "a\u202eb \x00 \x1b[31m c\u200b"
    found = inspect_rows([chat(hidden, "b", source="na\u202eme")], tokenizer)
    path = write_page(found, tmp_path / "hidden.html", tokenizer)
    page = browser_page.open(path)
    text = page.inner_text("#tokens")
    assert "␀" in text and "␛[31m" in text and "\u202e" not in text and "\u202e" not in page.inner_text("#head")
    assert not {"\u202e", "\x00", "\x1b"} & set(path.read_text(encoding="utf-8"))
    page.locator("#tokens span", has_text="\ufffd").first.click()
    assert "U+202E RIGHT-TO-LEFT OVERRIDE" in page.inner_text("#status")
    assert page.locator("#tokens .thin").count() == 1


def test_half_a_surrogate_pair_in_a_name(tokenizer, tmp_path, browser_page):
    found = inspect_rows([chat("a", "b"), chat("a", "b")], tokenizer, source="na\udce9me")
    page = browser_page.open(write_page(found, tmp_path / "name.html", tokenizer))
    assert page.inner_text("#head").startswith("1 of 2: na") and browser_page.errors == []


def test_the_page_runs_no_script_but_its_own(page_file, tmp_path, browser_page):
    html = page_file.read_text(encoding="utf-8")
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', html)
    assert re.search(r"script-src 'sha256-[\w+/=]{44}'", policy) and "script-src 'unsafe-inline'" not in policy
    changed = tmp_path / "changed.html"
    changed.write_text(html.replace("</body>", "<script>window.broken = 1</script></body>"), encoding="utf-8")
    page = browser_page.open(changed)
    assert page.evaluate("window.broken") is None and page.locator("#tokens .on").count() > 0
    assert any("Content Security Policy" in error for error in browser_page.errors)


@pytest.mark.slow
def test_repeats_are_shown_with_what_they_repeat_and_long_rows_with_what_they_lack(tokenizer, tmp_path, browser_page):
    rows = [chat("same", "same"), chat("other", "words"), chat("same", "same"), chat("x " * 20_000, "end")]
    page = browser_page.open(write_page(inspect_rows(rows, tokenizer), tmp_path / "few.html", tokenizer))
    page.locator(".links[data-kind=duplicates] button").click()
    assert page.inner_text("#head").startswith("1 of 2: data 0")
    page.select_option("#filter", "longer_than_max_length")
    assert "are not on this page" in page.inner_text("#head") and browser_page.errors == []
