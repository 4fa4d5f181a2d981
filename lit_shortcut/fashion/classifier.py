"""Small convolutional classifier and its training: class agreement and Fréchet features for the embedded default."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

from lit_shortcut.bounds import require_at_least
from lit_shortcut.images import LabelledImages
from lit_shortcut.tasks.optimized import OptimizedTask
from lit_shortcut.weights import load_module


def _convolution(in_width: int, width: int) -> list[nn.Module]:
    return [nn.Conv2d(in_width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]


class FashionCNN(nn.Module):
    """Network from grey images to class logits; its 128 pooled features before the last layer serve Fréchet distances.

    Args:
        num_classes: number of classes.
        width: channels of the first stage, doubled at each of the next two.
    """

    def __init__(self, num_classes: int = 10, width: int = 32) -> None:
        super().__init__()
        require_at_least(1, num_classes=num_classes, width=width)
        self.hparams = {"num_classes": num_classes, "width": width}
        self.num_features = 4 * width
        self.body = nn.Sequential(
            *_convolution(1, width),
            nn.MaxPool2d(2),
            *_convolution(width, 2 * width),
            nn.MaxPool2d(2),
            *_convolution(2 * width, 4 * width),
            *_convolution(4 * width, 4 * width),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(4 * width, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """Return features (B, 4·width) of uint8 ``images`` (B, 1 or 3, H, W); colour images are averaged to grey."""
        grey = images.float().mean(dim=1, keepdim=True) / 127.5 - 1
        pooled: Tensor = self.body(grey.to(self.head.weight.dtype))
        return pooled

    def forward(self, images: Tensor) -> Tensor:
        """Return class logits (B, num_classes) of uint8 ``images`` (B, 1 or 3, H, W)."""
        logits: Tensor = self.head(self.dropout(self.features(images)))
        return logits

    @classmethod
    def load(cls, path: Path) -> FashionCNN:
        """Load the frozen classifier at ``path``; raises :class:`~lit_shortcut.weights.WeightsError` if it fails."""
        return load_module(cls, path)


class FashionFeatures(nn.Module):
    """Pooled features of a :class:`FashionCNN`, an extractor for grey images.

    Args:
        classifier: the network.
    """

    def __init__(self, classifier: FashionCNN) -> None:
        super().__init__()
        self.classifier, self.num_features = classifier, classifier.num_features

    def forward(self, images: Tensor) -> Tensor:
        """Return features (B, num_features) of uint8 ``images`` (B, 1 or 3, H, W)."""
        return self.classifier.features(images)

    @classmethod
    def load(cls, path: Path) -> FashionFeatures:
        """Load the frozen classifier at ``path``; raises :class:`~lit_shortcut.weights.WeightsError` if it fails."""
        return cls(FashionCNN.load(path))


class ClassifierTask(OptimizedTask):
    """Training by cross-entropy with label smoothing; every other batch is mirrored.

    Args:
        classifier: the network to train.
        num_classes: number of classes.
        **optimization: optimiser and schedule, as :class:`~lit_shortcut.tasks.optimized.OptimizedTask` takes them.
    """

    def __init__(
        self,
        classifier: FashionCNN,
        num_classes: int = 10,
        **optimization: Any,
    ) -> None:
        super().__init__(classifier, **optimization)
        self.accuracy = MulticlassAccuracy(num_classes, average="micro")

    def training_step(self, batch: LabelledImages, batch_idx: int) -> Tensor:
        """Return the cross-entropy of one batch."""
        pixels = batch.pixels.flip(-1) if batch_idx % 2 else batch.pixels
        loss = F.cross_entropy(self.network(pixels), batch.labels, label_smoothing=0.1)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: LabelledImages, batch_idx: int) -> None:
        """Log the accuracy on held-out images."""
        self.accuracy(self.network(batch.pixels), batch.labels)
        self.log("val/accuracy", self.accuracy, prog_bar=True, batch_size=len(batch.labels))

    def test_step(self, batch: LabelledImages, batch_idx: int) -> None:
        """Log the accuracy on the test images."""
        self.accuracy(self.network(batch.pixels), batch.labels)
        self.log("test/accuracy", self.accuracy, batch_size=len(batch.labels))
