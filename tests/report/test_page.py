from __future__ import annotations

import base64
from pathlib import Path

import pytest
import torch
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

from lit_shortcut.report.grids import strip_paths
from lit_shortcut.report.page import page
from tests.browser import PATIENCE, console, point_at
from tests.report.made import HOLD, ROWS, SHORT, VANILLA, collected, conditions, make

NASTY = "</script><img src=x onerror=alert(1)> \"$5\" and '$10' &amp; %{x} {{ 7 }}"


def write(folder: Path, quality: str | None = "distance", size: int = 8, metric: str = "distance") -> Path:
    """The page of three rows with two images each, whose grey tells the rows apart."""
    results = make(folder)
    for index, row in enumerate(ROWS):
        results.add_images(
            row, torch.full((2, 3, size, size), 60 * index, dtype=torch.uint8), conditions(NASTY, "a coat")
        )
    table = collected(results, ROWS, [0, 1, 2]).rename(
        columns={"distance": metric, "distance_interval": f"{metric}_interval"}
    )
    path = folder / "report.html"
    text = page(
        table,
        reference=VANILLA.name,
        quality=quality,
        higher_is_better=False,
        strips=strip_paths(results, ROWS, VANILLA),
        prompts=results.columns(VANILLA)["prompts"],
        notes=f"Two images a row.\n- {NASTY}",
        provenance={"commit": "0123abc", "command": NASTY},
    )
    path.write_text(text, encoding="utf-8")
    return path


def open_page(browser: Chrome, path: Path) -> None:
    console(browser)
    browser.get(path.as_uri())


def find(browser: Chrome, selector: str) -> WebElement:
    return WebDriverWait(browser, PATIENCE).until(lambda _: browser.find_element(By.CSS_SELECTOR, selector))


def texts(browser: Chrome, selector: str) -> list[str]:
    return [element.text for element in browser.find_elements(By.CSS_SELECTOR, selector)]


def shown(browser: Chrome) -> str:
    return find(browser, "#shown").get_attribute("src") or ""


def of_file(folder: Path, name: str) -> str:
    return "data:image/png;base64," + base64.b64encode((folder / "images" / f"{name}.png").read_bytes()).decode()


def test_point_shows_its_label_under_the_mouse_and_its_images_when_clicked(browser: Chrome, tmp_path: Path) -> None:
    open_page(browser, write(tmp_path))
    assert find(browser, "#reference").get_attribute("src") == of_file(tmp_path, VANILLA.name)
    assert shown(browser) == of_file(tmp_path, HOLD.name)  # an accelerated row to begin with
    fastest = find(browser, "#plot .scatterlayer .trace:nth-child(1) .point")  # of vanilla's line
    point_at(browser, fastest)
    label = WebDriverWait(browser, PATIENCE).until(lambda _: " ".join(texts(browser, ".hoverlayer .hovertext")))
    for part in (
        "vanilla, N = 4",
        "b: 4",
        "latency ms/image: 40.0 (0.5)",
        "speed-up: 2.00×",
        "distance: 9.500 ± 1.242",
    ):
        assert part in label
    point_at(browser, fastest, click=True)
    WebDriverWait(browser, PATIENCE).until(lambda _: shown(browser) == of_file(tmp_path, SHORT.name))
    assert texts(browser, "#shown-label") == ["vanilla, N = 4"]
    assert [row.get_attribute("data-name") for row in browser.find_elements(By.CSS_SELECTOR, "tr.selected")] == [
        SHORT.name
    ]
    find(browser, f"tr[data-name={HOLD.name}] button").click()
    assert shown(browser) == of_file(tmp_path, HOLD.name)
    assert console(browser) == []


def test_table_sorts_by_number_both_ways(browser: Chrome, tmp_path: Path) -> None:
    open_page(browser, write(tmp_path))
    columns = texts(browser, "#rows th")
    header = browser.find_elements(By.CSS_SELECTOR, "#rows th button")[columns.index("latency ms/image")]
    cells = f"#rows td:nth-child({columns.index('latency ms/image') + 1})"
    assert texts(browser, cells) == ["80.0 (1.0)", "40.0 (0.5)", "20.0 (0.2)"]
    header.click()
    assert texts(browser, cells) == ["20.0 (0.2)", "40.0 (0.5)", "80.0 (1.0)"]
    header.click()
    assert texts(browser, cells) == ["80.0 (1.0)", "40.0 (0.5)", "20.0 (0.2)"]
    assert console(browser) == []


def test_any_text_is_shown_as_it_is(browser: Chrome, tmp_path: Path) -> None:
    open_page(browser, write(tmp_path, quality=NASTY, metric=NASTY))
    assert texts(browser, ".captions span") == [NASTY, "a coat"]
    assert NASTY in texts(browser, "#rows th")
    assert texts(browser, ".notes li") == [NASTY]
    assert NASTY in texts(browser, "dd")
    assert texts(browser, "#plot .ytitle") == [f"{NASTY} (lower is better)"]
    assert browser.find_elements(By.CSS_SELECTOR, "img[src=x]") == []
    assert console(browser) == []


def test_page_without_a_quality_has_the_table_only(browser: Chrome, tmp_path: Path) -> None:
    path = write(tmp_path, quality=None)
    open_page(browser, path)
    assert len(texts(browser, "#rows tbody tr")) == 3
    assert browser.find_elements(By.ID, "plot") == []
    assert path.stat().st_size < 100_000
    assert console(browser) == []


@pytest.mark.parametrize("size", [8, 300])
def test_images_are_embedded_not_higher_than_they_are_shown(tmp_path: Path, size: int) -> None:
    text = write(tmp_path, size=size).read_text(encoding="utf-8")
    assert (of_file(tmp_path, HOLD.name) in text) == (size == 8)
    assert text.count("data:image/jpeg") == (0 if size == 8 else 4)  # three in the script, vanilla's on the page
