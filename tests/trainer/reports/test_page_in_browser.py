"""The page in a real browser: an empty console, every picture, and all of it within a keyboard's reach."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import pytest
from repa.trainer.reports.page import compare_runs
from run_folders import make_run, write_figures

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

sync_api = pytest.importorskip("playwright.sync_api", reason="the extra `browser` is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed"),
]

FOCUSED = """(each => each === document.body ? null
    : each.id || each.getAttribute('aria-label') || each.textContent.trim())(document.activeElement)"""
CHARTS = """[...document.querySelectorAll('svg.chart')].filter(each => each.checkVisibility())
    .map(each => each.querySelector('title').textContent)"""
CURVES = """[...document.querySelectorAll('svg .curve')]
    .filter(each => getComputedStyle(each).display !== 'none').map(each => each.classList[1])"""
LOADED = "[...document.images].map(each => each.complete && each.naturalWidth > 0)"
TOO_WIDE = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
PAPER = "getComputedStyle(document.body).backgroundColor"


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("page")
    quick = {"steps": 100, "log_every": 10, "previews": (50, 100)}
    runs = [
        make_run(root / "none-seed0", **quick),
        make_run(root / "none-seed1", seed=1, **quick),
        make_run(root / ("<b>" + "long-" * 30), method="repa", method__depth=2, **quick),
    ]
    write_figures(runs[2], {})
    page: Path = root / "page.html"
    page.write_text(compare_runs(runs)[0], encoding="utf-8")
    return page.as_uri()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        # root, as in a container, has no sandbox
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (360, "light")])
def test_nothing_is_wrong(browser: Any, address: str, width: int, scheme: str) -> None:
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    said: list[str] = []
    asked: list[str] = []
    page = context.new_page()
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    assert page.evaluate(LOADED) == [True] * 6
    assert page.evaluate(TOO_WIDE) == 0
    assert page.evaluate(PAPER) == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(18, 22, 28)")
    assert said == []
    assert [each for each in asked if not each.startswith(("file:", "data:"))] == []
    context.close()


def test_the_keyboard_reaches_everything(browser: Any, address: str) -> None:
    page = browser.new_page()
    page.goto(address)
    focused: list[str] = []
    for _ in range(100):
        page.keyboard.press("Tab")
        now = page.evaluate(FOCUSED)
        if now is None:
            break
        focused.append(now)
    assert focused[-1] == "Settings that are the same in all runs"
    assert focused[:7] == ["Curves", "Samples", "Numbers", "Settings", "axis-steps", "show-0", "show-1"]
    assert focused[7] == "Values of loss"
    tables = ["Evaluation", "Held-out loss", "Cost", "Settings in which the runs differ"]
    assert [each for each in focused if each in tables] == tables
    page.focus("#axis-steps")
    assert set(page.evaluate(CURVES)) == {"of0", "of1"}
    assert all("against steps" in each for each in page.evaluate(CHARTS))
    page.keyboard.press("ArrowRight")
    shown = page.evaluate(CHARTS)
    assert len(shown) == 6
    assert all("against images" in each for each in shown)
    page.focus("#show-0")
    page.keyboard.press("Space")
    assert set(page.evaluate(CURVES)) == {"of1"}
    page.focus("summary")
    page.keyboard.press("Enter")
    assert page.evaluate("document.querySelector('details').open")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.close()
