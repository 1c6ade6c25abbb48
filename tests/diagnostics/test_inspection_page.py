"""The page of an inspection: what it holds, and what a browser makes of it."""

from __future__ import annotations

import re

import orjson
import pytest

from hf_objectives import demo
from hf_objectives.diagnostics.inspection import inspect_rows
from hf_objectives.diagnostics.inspection_page import page_data, write_page

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


def test_a_phone_in_the_dark(page_file, browser_context):
    tab = browser_context(color_scheme="dark", viewport={"width": 390, "height": 800}, has_touch=True)
    page = tab.open(page_file)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(13, 17, 23)"
    page.locator("#tokens .on").first.tap()
    assert page.inner_text("#status").endswith("  trained") and tab.errors == []
