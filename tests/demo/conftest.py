"""A real browser for the pages: Chromium driven by Playwright. Where either is absent, tests that ask for it are skipped."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: it drives the browser")
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed: the page is looked at in it")
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    arguments += ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]  # a drawn webcam
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield started
        started.close()


@pytest.fixture(scope="session")
def windows(browser: Any) -> Callable[[str], Any]:
    """Opens an address in windows of their own, and sees that none of them asks the web for anything."""

    @contextmanager
    def of(address: str) -> Iterator[Callable[..., Any]]:
        opened, outside = [], []

        def open_page(width: int = 1280, height: int = 860) -> Any:
            page = browser.new_context(viewport={"width": width, "height": height}).new_page()
            page.set_default_timeout(60_000)
            page.on("request", lambda request: outside.append(request.url) if request.url.startswith("http") else None)
            page.goto(address)
            opened.append(page)
            return page

        yield open_page
        for page in opened:
            page.context.close()
        assert [url for url in outside if not url.startswith(address)] == []

    return of
