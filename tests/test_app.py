"""``lit-shortcut app``: as a person in a browser, and what its server refuses."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from PIL import Image, ImageChops
from selenium.webdriver import ActionChains, Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

from lit_shortcut import load
from lit_shortcut.acceleration.calibrated import PlanFile, SearchedSteps
from lit_shortcut.acceleration.shortcut import Shortcut
from lit_shortcut.app import MOST_CHARACTERS, build, compare, serve
from lit_shortcut.cli import main
from lit_shortcut.decoding.schedules import tokens_per_step
from lit_shortcut.pipeline import Pipeline
from tests.browser import PATIENCE, console
from tests.command_line import CONFIGS

CHECKPOINTS = CONFIGS.parent / "checkpoints"


@pytest.fixture(scope="module")
def texts() -> Pipeline:
    return load(CHECKPOINTS / "fashion_text", budget=3, device="cpu")


@pytest.fixture(scope="module")
def classes() -> Pipeline:
    return load(CHECKPOINTS / "fashion", budget=3, device="cpu")


def same(one: Image.Image, other: Image.Image) -> bool:
    return ImageChops.difference(one, other).getbbox() is None


# ---- what is drawn


def test_sides_are_the_pictures_of_the_pipeline_at_one_seed(texts: Pipeline) -> None:
    steps: list[tuple[int, int]] = []
    vanilla, shortcut = compare(texts, "a dark, wide coat", 5, 4, 3, lambda *both: steps.append(both))
    for side, numbers in ((vanilla, {"num_steps": 4, "budget": 4}), (shortcut, {"budget": 3})):
        (image,) = texts("a dark, wide coat", seeds=5, **numbers).images
        assert same(side.image.resize(image.size, Image.Resampling.NEAREST), image)
    assert vanilla.full == (True,) * 4
    assert (sum(shortcut.full), len(shortcut.full), shortcut.full[0]) == (3, 16, True)
    assert steps == [(done, 20) for done in range(1, 21)]
    assert re.fullmatch(r"shortcut: 3 of 16 base passes, [\d.]+ ms  \n●[●○]{15}", str(shortcut))


def test_whole_budget_is_vanilla(classes: Pipeline) -> None:
    vanilla, shortcut = compare(classes, 7, 1, 16, 16)
    assert same(vanilla.image, shortcut.image)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"wanted": " "}, "1 to 500 characters, got 0"),
        ({"wanted": "a" * (MOST_CHARACTERS + 1)}, "got 501"),
        ({"wanted": 3}, "takes prompts"),
        ({"seed": 2**63}, "seed"),
        ({"num_steps": 17}, "steps must lie in 1..16, got 17"),
        ({"num_steps": 0}, "steps must lie in 1..16, got 0"),
        ({"budget": 0}, "budget"),
        ({"budget": 17}, "budget"),
    ],
)
def test_server_refuses_what_is_out_of_range(texts: Pipeline, changed: dict[str, Any], message: str) -> None:
    asked: dict[str, Any] = {"wanted": "a coat", "seed": 0, "num_steps": 16, "budget": 3}
    with pytest.raises(ValueError, match=re.escape(message)):
        compare(texts, **(asked | changed))


def test_page_without_a_shortcut_is_refused(classes: Pipeline) -> None:
    with pytest.raises(ValueError, match=r"no model\.shortcut"):
        build(Pipeline(classes.base, classes.decoding))


def test_server_warms_up_within_the_budgets_of_a_calibrated_plan(
    classes: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_shortcut.app.build", lambda _: SimpleNamespace(launch=lambda **_: None))
    shutil.copytree(CHECKPOINTS / "fashion" / "shortcut", tmp_path / "shortcut")
    shortcut, decoding = Shortcut.load(tmp_path / "shortcut"), classes.decoding
    counts = tokens_per_step(decoding.schedule, decoding.num_steps, classes.base.spec.num_tokens)
    schedule = SearchedSteps(counts=counts, trajectories=1, steps={"3": [0, 5, 9]}, kl={"3": 0.0})
    PlanFile(shortcut.identity(), classes.base.fingerprint, [schedule]).write(tmp_path / "shortcut" / "plan.json")
    serve(Pipeline(classes.base, decoding, Shortcut.load(tmp_path / "shortcut"), "calibrated", 3))


# ---- the command


@pytest.mark.parametrize("words", [[], ["--config=a.yaml", "--checkpoint=b"]])
def test_command_takes_a_configuration_or_a_checkpoint(words: list[str]) -> None:
    with pytest.raises(ValueError, match="--config or --checkpoint"):
        main(["app", *words])


def test_checkpoint_is_served_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[tuple[Any, ...]] = []
    monkeypatch.setattr("lit_shortcut.app.serve", lambda *arguments: served.append(arguments))
    main(["app", "--checkpoint", str(CHECKPOINTS / "fashion"), "--host", "0.0.0.0", "--port", "7900"])
    ((pipeline, *where),) = served
    assert pipeline.decoding.num_steps == 16
    assert where == ["0.0.0.0", 7900]


def test_configuration_is_served_in_its_precision(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    served: list[Pipeline] = []
    monkeypatch.setattr("lit_shortcut.app.serve", lambda pipeline, *_: served.append(pipeline))
    own = tmp_path / "generate.yaml"
    known = yaml.safe_load((CONFIGS / "fashion" / "generate.yaml").read_text())
    known["trainer"] |= {"precision": "bf16-true", "accelerator": "cpu"}
    known["model"]["init_args"] |= {
        name: str(CONFIGS / "fashion" / known["model"]["init_args"][name]) for name in ("base", "decoding", "shortcut")
    }
    own.write_text(yaml.safe_dump(known))
    main(["app", "--config", str(own)])
    (pipeline,) = served
    assert pipeline.base.interface.code_embedding.dtype == torch.bfloat16


def test_missing_gradio_is_said_with_the_way_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "lit_shortcut.app")
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ModuleNotFoundError, match=r"lit-shortcut\[app\]"):
        main(["app", "--checkpoint", "x"])


# ---- in a browser


@pytest.fixture
def address(browser: Chrome, tmp_path: Path) -> Iterator[str]:
    """Where the real command serves the embedded text-to-image default; ``browser`` comes first, for it may skip."""
    (tmp_path / "checkpoints").symlink_to(CHECKPOINTS)
    command = [sys.executable, "-u", "-m", "lit_shortcut.cli", "app"]
    command += ["--config", str(CONFIGS / "fashion_text" / "generate.yaml")]
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        try:
            said = []
            for line in process.stdout:
                said.append(line)
                if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                    break
            assert found, "".join(said)
            yield found[0]
        finally:
            process.terminate()
            process.stdout.read()


def test_person_types_moves_and_sees(browser: Chrome, address: str) -> None:
    def wait(condition: Any) -> Any:
        return WebDriverWait(browser, PATIENCE).until(lambda _: condition())

    def field(label: str) -> WebElement:
        return wait(lambda: browser.find_elements(By.CSS_SELECTOR, f"[aria-label*='{label}']"))[0]

    def captions() -> list[str]:
        return [
            text
            for part in browser.find_elements(By.CSS_SELECTOR, "[data-testid=markdown]")
            if "passes," in (text := part.text)
        ]

    def sources() -> list[str]:
        return [
            image.get_attribute("src") or "" for image in browser.find_elements(By.CSS_SELECTOR, ".image-frame img")
        ]

    console(browser)
    browser.get(address)
    prompt = wait(lambda: browser.find_element(By.CSS_SELECTOR, "textarea"))
    prompt.send_keys(Keys.ENTER)
    assert "1 to 500 characters" in wait(lambda: browser.find_element(By.CSS_SELECTOR, ".toast-body").text)
    prompt.send_keys("a dark, wide coat", Keys.ENTER)
    wait(lambda: len(sources()) == 2)
    vanilla, shortcut = wait(captions)
    assert vanilla.startswith("vanilla: 16 of 16 base passes")
    assert vanilla.endswith("●" * 16)
    assert shortcut.startswith("shortcut: 3 of 16 base passes")
    before = sources()
    slider = field("range slider for Shortcut")
    from_middle = int(-6.5 * slider.size["width"] / 15)  # of 1 … 16, to 2
    ActionChains(browser).click_and_hold(slider).move_by_offset(from_middle, 0).release().perform()
    wait(lambda: len(captions()) == 2 and captions()[1].startswith("shortcut: 2 of 16 base passes"))
    wait(lambda: sources()[1] != before[1])
    assert console(browser) == []
    fetched = "return performance.getEntriesByType('resource').map(entry => entry.name)"
    assert [name for name in browser.execute_script(fetched) if not name.startswith(address)] == []
