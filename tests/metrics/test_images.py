from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import jsonargparse
import pytest
import torch
from torch import Tensor, nn

from lit_shortcut.fashion.classifier import FashionCNN, FashionFeatures
from lit_shortcut.metrics.images import ClassAgreement, ImageMetric, collection
from lit_shortcut.weights import save_module
from tests.metrics.asked import asked
from tests.metrics.reference import write_reference


class ReadsLabel(nn.Module):
    """Takes an image for the class its first pixel names."""

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.one_hot(images[:, 0, 0, 0].long(), 10).float()


class Sure(nn.Module):
    """Takes every image for class 0; has weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(10))

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.one_hot(torch.zeros(len(images)).long(), 10) + self.weight


def test_agreement_is_the_share_of_images_taken_for_their_class() -> None:
    metric = ClassAgreement(ReadsLabel())
    images = torch.arange(8, dtype=torch.uint8).view(8, 1, 1, 1).expand(-1, 3, 4, 4)
    metric.update(images[:2], asked(torch.tensor([0, 1])))
    metric.update(images[2:], asked(torch.tensor([2, 0, 0, 0, 0, 7])))
    assert metric.compute() == 0.5
    metric.reset()
    metric.update(images[:1], asked(torch.tensor([5])))
    assert metric.compute() == 0


def test_networks_enter_no_checkpoint_no_optimiser_and_no_copy() -> None:
    metric = ClassAgreement(Sure())
    task = nn.ModuleDict({"metrics": collection({"agreement": metric})})
    metric.update(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), asked(torch.tensor([0, 1])))
    assert not task.state_dict()
    assert not list(task.parameters())
    copied = deepcopy(task)["metrics"]["agreement"]  # type: ignore[index]
    assert copied.classifier.module is metric.classifier.module
    assert copied.compute() == 0.5


def test_networks_move_with_their_metric_and_keep_their_precision() -> None:
    metric = ClassAgreement(Sure())
    nn.ModuleDict({"metrics": collection({"agreement": metric})}).half()
    assert metric.classifier.module.weight.dtype == torch.float32
    metric.to("meta")
    assert metric.classifier.module.weight.is_meta


def test_metrics_that_agree_on_the_first_images_stay_apart() -> None:
    metrics = collection({"reads": ClassAgreement(ReadsLabel()), "sure": ClassAgreement(Sure())})
    for label in (0, 1):
        metrics.update(torch.full((2, 3, 4, 4), label, dtype=torch.uint8), asked(torch.tensor([label] * 2)))
    assert metrics.compute() == {"reads": 1.0, "sure": 0.5}


def test_identity_tells_classifiers_apart() -> None:
    torch.manual_seed(0)
    first, second = ClassAgreement(FashionCNN(width=2)), ClassAgreement(FashionCNN(width=2))
    assert first.identity() == ClassAgreement(deepcopy(first.classifier.module)).identity() != second.identity()
    assert first.higher_is_better


def test_metrics_are_built_from_yaml(tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_module(tmp_path / "classifier.safetensors", FashionCNN(width=4))
    extractor = FashionFeatures.load(tmp_path / "classifier.safetensors")
    images = torch.randint(0, 256, (6, 1, 8, 8), dtype=torch.uint8)
    write_reference(tmp_path / "reference.safetensors", extractor, [images], "random pixels")
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--metrics", type=dict[str, ImageMetric])
    classifier = {"init_args": {"path": str(tmp_path / "classifier.safetensors")}}
    features = {"class_path": "lit_shortcut.fashion.classifier.FashionFeatures.load"} | classifier
    network = {"class_path": "lit_shortcut.fashion.classifier.FashionCNN.load"} | classifier
    config = parser.parse_object(
        {
            "metrics": {
                "fid_fashion_cnn": {
                    "class_path": "lit_shortcut.metrics.distances.FrechetDistance",
                    "init_args": {"extractor": features, "reference": str(tmp_path / "reference.safetensors")},
                },
                "agreement": {
                    "class_path": "lit_shortcut.metrics.images.ClassAgreement",
                    "init_args": {"classifier": network},
                },
            }
        }
    )
    metrics: dict[str, ImageMetric] = parser.instantiate(config).metrics
    labels = extractor.classifier(images).argmax(-1)
    for metric in metrics.values():
        metric.to(torch.device("cpu"))
        metric.update(images.expand(-1, 3, -1, -1), asked(labels))
    assert metrics["fid_fashion_cnn"].compute() == pytest.approx(0, abs=1e-5)
    assert metrics["agreement"].compute() == 1
