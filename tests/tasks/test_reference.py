from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lit_shortcut.images import LabelledImages
from lit_shortcut.metrics.distances import FrechetDistance
from lit_shortcut.tasks.reference import ReferenceTask
from lit_shortcut.weights import load_tensors
from tests.metrics.asked import asked


class Means(nn.Module):
    """Two features: the mean of the upper and of the lower half of an image."""

    num_features = 2

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(1 / 255))

    def forward(self, images: Tensor) -> Tensor:
        halves: Tensor = images.float().mean(1).unflatten(1, (2, -1)).mean((2, 3)) * self.scale
        return halves


def images() -> Tensor:
    return torch.randint(256, (10, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=["32-true", "bf16-true"])
def path(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that ``predict`` over ten images in uneven batches writes, the same in every precision."""
    monkeypatch.setattr("sys.argv", ["/somewhere/bin/lightning", "predict", "--config", "configs/x.yaml"])
    batches = [LabelledImages(part, torch.zeros(len(part))) for part in images().split(4)]
    loader: Any = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    task = ReferenceTask(Means(), tmp_path / "reference.safetensors", images="ten of noise", licence="MIT")
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "precision": request.param,
    }
    L.Trainer(**quiet).predict(task, loader, return_predictions=False)
    return tmp_path / "reference.safetensors"


def test_statistics_are_mean_and_covariance_over_all_images(path: Path) -> None:
    tensors, metadata = load_tensors(path)
    features = Means()(images()).double()
    torch.testing.assert_close(tensors["mean"], features.mean(0))
    torch.testing.assert_close(tensors["covariance"], features.T.cov())
    assert metadata["num_images"] == 10
    assert metadata["images"] == "ten of noise"


def test_images_are_at_no_distance_from_their_own_statistics(path: Path) -> None:
    distance = FrechetDistance(Means(), path)
    distance.update(images(), asked(torch.zeros(10)))
    assert float(distance.compute()) == pytest.approx(0, abs=1e-6)
    distance.reset()
    distance.update(images() // 2, asked(torch.zeros(10)))
    assert float(distance.compute()) > 0.01


def test_manifest_says_which_images_they_are(path: Path) -> None:
    entry = yaml.safe_load(path.with_name("manifest.yaml").read_text())["reference.safetensors"]
    assert entry["images"] == "ten of noise"
    assert entry["licence"] == "MIT"
    assert entry["made_by"] == "lit-shortcut predict --config configs/x.yaml"
    assert entry["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_several_ranks_are_refused(tmp_path: Path) -> None:
    task = ReferenceTask(Means(), tmp_path / "reference.safetensors", images="none")
    ranks = SimpleNamespace(world_size=2)
    task.trainer = ranks  # type: ignore[assignment]
    with pytest.raises(ValueError, match="made on one device, got 2"):
        task.on_predict_start()
