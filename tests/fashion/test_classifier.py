from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lit_shortcut.fashion.classifier import FashionCNN
from lit_shortcut.weights import save_module


@pytest.fixture
def classifier() -> FashionCNN:
    torch.manual_seed(0)
    classifier = FashionCNN(num_classes=4, width=6)
    classifier.train()
    for _ in range(3):
        classifier(images(8))  # moves the running statistics away from their initial values
    return classifier.eval()


def images(count: int, channels: int = 1, side: int = 28) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(256, (count, channels, side, side), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("side", [12, 28])
def test_logits_are_the_head_of_the_features(classifier: FashionCNN, side: int) -> None:
    features = classifier.features(images(3, side=side))
    assert features.shape == (3, classifier.num_features) == (3, 24)
    logits = classifier(images(3, side=side))
    assert logits.shape == (3, 4)
    torch.testing.assert_close(logits, features @ classifier.head.weight.T + classifier.head.bias)


def test_default_has_128_features() -> None:
    assert FashionCNN().num_features == 128


def test_colours_are_averaged_to_grey(classifier: FashionCNN) -> None:
    grey = images(2)
    torch.testing.assert_close(classifier(grey.expand(-1, 3, -1, -1)), classifier(grey))
    colour = images(2, channels=3)
    torch.testing.assert_close(classifier(colour), classifier(colour.flip(1)))


def test_an_image_does_not_see_its_batch(classifier: FashionCNN) -> None:
    torch.testing.assert_close(classifier(images(5))[2:3], classifier(images(5)[2:3]), rtol=1e-4, atol=1e-5)


def test_load_keeps_the_running_statistics(tmp_path: Path, classifier: FashionCNN) -> None:
    save_module(tmp_path / "classifier.safetensors", classifier)
    loaded = FashionCNN.load(tmp_path / "classifier.safetensors")
    assert torch.equal(loaded(images(3)), classifier(images(3)))
