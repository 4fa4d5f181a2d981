"""Scores of a folder, with stand-ins for the packages that answer as their documentation says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lit_shortcut.pictures import write_png

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "rewards" / "score.py"

IMAGE_REWARD = """
from PIL import Image
class Model:
    def score(self, prompt, image):
        return len(prompt) + Image.open(image).getpixel((0, 0))[0]
def load(name="ImageReward-v1.0", device="cuda", download_root=None, med_config=None):
    if name != "ImageReward-v1.0":
        open(name).close()
        open(med_config).close()
    assert device == "cpu"
    return Model()
"""
UNIPERCEPT = """
from PIL import Image
class UniPerceptRewardInferencer:
    def __init__(self, model_path=None, device="cuda"):
        assert model_path is None or model_path.endswith("weights"), model_path
    def reward(self, image_paths):
        values = [Image.open(path).getpixel((0, 0))[0] for path in image_paths]
        return [None if v == 255 else {"iaa": -1.0, "iqa": float(v), "ista": -1.0} for v in values]
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images with prompts, beside the stand-ins."""
    for name, code in {"ImageReward": IMAGE_REWARD, "unipercept_reward": UNIPERCEPT}.items():
        (tmp_path / "packages" / name).mkdir(parents=True)
        (tmp_path / "packages" / name / "__init__.py").write_text(code)
    (tmp_path / "images").mkdir()
    for name, value in (("00.png", 10), ("01.png", 20), ("02.png", 60)):
        Image.new("RGB", (4, 4), (value,) * 3).save(tmp_path / "images" / name)
    (tmp_path / "images" / "prompts.json").write_text(json.dumps(["a", "ccc", "größ"]), encoding="utf-8")
    return tmp_path / "images"


def score(model: str, folder: Path, *words: str) -> dict[str, Any]:
    environment = os.environ | {"PYTHONPATH": str(folder.parent / "packages")}
    command = [sys.executable, str(SCRIPT), model, str(folder), "--device", "cpu", *words]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if run.returncode:
        raise RuntimeError(run.stderr)
    found: dict[str, Any] = json.loads((folder / f"scores_{model}.json").read_text())
    return found


def test_imagereward_is_asked_with_each_image_and_its_own_prompt(folder: Path) -> None:
    found = score("imagereward", folder)
    assert found["scores"] == {"00.png": 11, "01.png": 23, "02.png": 64}
    assert found["mean"] == pytest.approx(98 / 3)


def test_pictures_that_generate_wrote_hold_their_prompts(folder: Path) -> None:
    (folder / "prompts.json").unlink()
    for path, prompt in zip(sorted(folder.glob("*.png")), ["a", "ccc", "größ"], strict=True):
        write_png(path, Image.open(path), {"prompt": prompt, "seed": 1})
    write_png(folder / "grid.png", Image.new("RGB", (8, 8)), {"methods": ["shortcut"]})
    assert score("imagereward", folder)["scores"] == {"00.png": 11, "01.png": 23, "02.png": 64}
    Image.new("RGB", (4, 4)).save(folder / "03.png")
    with pytest.raises(
        RuntimeError, match=r"03\.png: expected its prompt inside it, or all prompts in .*prompts\.json"
    ):
        score("imagereward", folder)


def test_vanilla_drawn_beside_the_others_has_a_mean_of_its_own(folder: Path) -> None:
    Image.new("RGB", (4, 4), (90,) * 3).save(folder / "00_vanilla.png")
    found = score("unipercept", folder)
    assert (found["mean"], found["mean_vanilla"]) == (30, 90)


def test_unipercept_gives_its_quality_and_needs_no_prompts(folder: Path) -> None:
    (folder / "prompts.json").unlink()
    assert score("unipercept", folder, "--weights", "some/weights")["mean"] == 30


def test_weights_of_a_folder_are_given_to_the_package(folder: Path) -> None:
    weights = folder.parent / "weights"
    weights.mkdir()
    (weights / "ImageReward.pt").touch()
    with pytest.raises(RuntimeError, match=r"med_config\.json"):
        score("imagereward", folder, "--weights", str(weights))
    (weights / "med_config.json").touch()
    assert score("imagereward", folder, "--weights", str(weights))["mean"] == pytest.approx(98 / 3)


def test_folder_that_does_not_fit_is_refused(folder: Path) -> None:
    Image.new("RGB", (4, 4), (255,) * 3).save(folder / "03.png")
    with pytest.raises(RuntimeError, match=r"03\.png: unipercept-reward failed"):
        score("unipercept", folder)
    with pytest.raises(RuntimeError, match=r"prompts\.json: expected a prompt for each of 4 images, found 3"):
        score("imagereward", folder)
    (folder.parent / "empty").mkdir()
    with pytest.raises(RuntimeError, match="empty: expected PNG files"):
        score("unipercept", folder.parent / "empty")
