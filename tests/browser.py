"""A headless Chromium as a person uses it: what stands on a page, the mouse, and what the console says."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from selenium.webdriver import ActionChains, Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.remote.webelement import WebElement

PATIENCE = 60  # seconds; a machine may be busy
_FLAGS = (
    "headless",
    "no-sandbox",
    "disable-gpu",
    "disable-quic",
    "disable-dev-shm-usage",
    "no-first-run",
    "disable-background-networking",
    "disable-component-update",
    "disable-sync",
    "hide-scrollbars",
    "window-size=1280,1400",
)


@contextmanager
def chromium(profile: Path) -> Iterator[Chrome]:
    """A browser with the empty folder ``profile``; skips the test where none is installed."""
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("no chromium with its chromedriver on this machine: apt-get install chromium chromium-driver")
    options = ChromeOptions()
    options.binary_location = browser
    for flag in (*_FLAGS, f"user-data-dir={profile}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    opened = Chrome(options, Service(driver))
    try:
        yield opened
    finally:
        opened.quit()


def console(browser: Chrome) -> list[str]:
    """What the console has said since it was last asked, warnings and errors."""
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] in ("WARNING", "SEVERE")]


def point_at(browser: Chrome, element: WebElement, *, click: bool = False) -> None:
    """Move the mouse onto ``element``, wherever it is on the page."""
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
    moves = ActionChains(browser).move_to_element_with_offset(element, 1, 1).move_to_element(element)
    (moves.click() if click else moves).perform()
