from __future__ import annotations

import gc
import sys
from pathlib import Path

import jsonargparse
import pytest
import torch
from torch import Tensor

from lit_shortcut.metrics.images import ImageMetric
from lit_shortcut.metrics.rewards import ImageReward, Reward, UniPerceptIQA
from lit_shortcut.weights import WeightsError
from tests.metrics.asked import asked

CPU = torch.device("cpu")
PROMPTS = ("a", "ccc", "größ")

# Stand-ins that answer as the packages' documentation says, and tell in their scores what they were given.
IMAGE_REWARD = """
import os
from PIL import Image
class Model:
    def score(self, prompt, image):
        print("scoring", prompt)
        if prompt == "die":
            os._exit(3)
        return len(prompt) + Image.open(image).getpixel((0, 0))[0]
def load(name="ImageReward-v1.0", device="cuda", download_root=None, med_config=None):
    print("load checkpoint from", name)
    if name != "ImageReward-v1.0":
        assert med_config.endswith("med_config.json")
        open(name).close()
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
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-ins, in a folder that other processes import from."""
    for name, code in {"ImageReward": IMAGE_REWARD, "unipercept_reward": UNIPERCEPT}.items():
        (tmp_path / "packages" / name).mkdir(parents=True)
        (tmp_path / "packages" / name / "__init__.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))


def images(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 4, 4)


@pytest.mark.usefixtures("packages")
def test_imagereward_is_asked_with_each_image_and_its_own_prompt() -> None:
    metric = ImageReward()
    metric.to(CPU)
    metric.update(images(10, 20), asked(torch.zeros(2), PROMPTS[:2]))
    metric.update(images(60), asked(torch.zeros(1), PROMPTS[2:]))
    assert float(metric.compute()) == pytest.approx((11 + 23 + 64) / 3)
    with torch.inference_mode():
        metric.reset()
    metric.update(images(10), asked(torch.zeros(1), PROMPTS[:1]))
    assert float(metric.compute()) == 11


@pytest.mark.usefixtures("packages")
def test_unipercept_gives_its_quality_and_needs_no_prompts(tmp_path: Path) -> None:
    metric = UniPerceptIQA(weights=tmp_path / "weights")
    metric.update(images(10, 20, 60), asked(torch.zeros(3)))
    assert float(metric.compute()) == 30


@pytest.mark.usefixtures("packages")
def test_an_image_that_the_package_fails_on_is_no_number() -> None:
    with pytest.raises(WeightsError, match="failed on an image"):
        UniPerceptIQA().update(images(10, 255), asked(torch.zeros(2)))


@pytest.mark.usefixtures("packages")
def test_images_without_prompts_are_refused() -> None:
    with pytest.raises(ValueError, match="a prompt for each of 2 images, got 0"):
        ImageReward().update(images(1, 2), asked(torch.zeros(2)))


@pytest.mark.usefixtures("packages")
def test_weights_of_a_folder_are_given_to_the_package(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"No such file.*ImageReward\.pt.*hf download THUDM/ImageReward"):
        ImageReward(weights=tmp_path).to(CPU)
    (tmp_path / "ImageReward.pt").touch()
    ImageReward(weights=tmp_path).to(CPU)


@pytest.mark.parametrize(
    ("metric", "advice"),
    [
        (ImageReward(), r"No module named 'ImageReward'.*pip install image-reward.*THUDM/ImageReward"),
        (UniPerceptIQA(), r"No module named 'unipercept_reward'.*pip install unipercept-reward.*Thunderbolt215215"),
    ],
    ids=["imagereward", "unipercept"],
)
def test_missing_package_is_told_before_any_image_is_drawn(
    metric: Reward, advice: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(WeightsError, match=advice):
        metric.to(CPU)


def test_missing_interpreter_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"none/python: no Python interpreter.*environment of its own"):
        ImageReward(python=tmp_path / "none" / "python").to(CPU)


@pytest.mark.usefixtures("packages")
def test_process_that_dies_is_told_and_the_next_images_start_another() -> None:
    metric = ImageReward()
    with pytest.raises(WeightsError, match="ended without an answer"):
        metric.update(images(1), asked(torch.zeros(1), ("die",)))
    metric.update(images(10), asked(torch.zeros(1), ("a",)))
    assert float(metric.compute()) == 11


@pytest.mark.usefixtures("packages")
def test_process_killed_between_images_is_told() -> None:
    metric = ImageReward()
    metric.to(CPU)
    assert metric.server
    metric.server.kill()
    metric.server.wait()
    with pytest.raises(WeightsError, match="ended without an answer"):
        metric.update(images(1), asked(torch.zeros(1), ("a",)))


@pytest.mark.usefixtures("packages")
def test_process_ends_with_its_metric() -> None:
    metric = ImageReward()
    metric.to(CPU)
    process = metric.server
    assert process
    assert process.poll() is None
    del metric
    gc.collect()
    assert process.poll() == 0


def test_rewards_are_built_from_yaml() -> None:
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--metrics", type=dict[str, ImageMetric])
    names = {"image_reward": "ImageReward", "unipercept_iqa": "UniPerceptIQA"}
    settings = {"init_args": {"python": sys.executable}}
    specs = {key: {"class_path": f"lit_shortcut.metrics.rewards.{name}"} | settings for key, name in names.items()}
    built = parser.instantiate(parser.parse_object({"metrics": specs})).metrics
    assert built["image_reward"].python == Path(sys.executable)
    assert isinstance(built["unipercept_iqa"], UniPerceptIQA)
