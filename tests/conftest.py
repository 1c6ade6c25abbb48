"""Settings and fixtures of all tests."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.support.hub_server import hub  # noqa: F401

# Programs that tests start find the package and the tests beside it.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(Path(__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest


def pytest_collection_finish() -> None:
    """What importing the libraries and collecting the tests left is there to stay: over a million objects, which the garbage
    collector would else go through again and again, for a fifth to a half of the time of tests that train."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000)  # what is left is small and short-lived


DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.fixture(scope="session")
def real_model_path() -> str:
    """A real chat model, from HF_OBJECTIVES_TEST_MODEL (a folder or a Hub id); skips, with the reason, without one."""
    from transformers import AutoConfig

    path = os.environ.get("HF_OBJECTIVES_TEST_MODEL", DEFAULT_MODEL)
    try:
        AutoConfig.from_pretrained(path)
    except OSError as error:
        pytest.skip(f"no real model: {path} cannot be loaded ({str(error).splitlines()[0][:120]})")
    return path


LOCAL = ("file:", "data:", "blob:", "about:")


class BrowserPage:
    """A tab, and what went wrong or out of it.

    Attributes:
        page: Playwright's page.
        errors: console errors and uncaught exceptions, as text.
        requests: addresses asked for that are not of this machine's files.
    """

    def __init__(self, page: Any) -> None:
        self.page = page
        self.errors: list[str] = []
        self.requests: list[str] = []
        page.on("console", lambda said: self.errors.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", self._requested)

    def _requested(self, request: Any) -> None:
        if not request.url.startswith(LOCAL):
            self.requests.append(request.url)

    def open(self, path: Path) -> Any:
        """Load a file; returns Playwright's page."""
        self.page.goto(path.resolve().as_uri())
        return self.page


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """The system's Chromium, started once."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no Chromium on this machine: chromium, chromium-browser and google-chrome are not on the PATH")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def browser_context(chromium: Any) -> Iterator[Callable[..., BrowserPage]]:
    """Makes tabs in contexts of their own: `browser_context(color_scheme="dark", viewport={...})`."""
    contexts = []

    def make(**options: Any) -> BrowserPage:
        context = chromium.new_context(**options)
        contexts.append(context)
        return BrowserPage(context.new_page())

    yield make
    for context in contexts:
        context.close()


@pytest.fixture
def browser_page(browser_context: Callable[..., BrowserPage]) -> BrowserPage:
    """A tab in light mode on a desktop's screen."""
    return browser_context()
