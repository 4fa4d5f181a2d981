"""A small convolutional classifier: class agreement and Fréchet features for the embedded default."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from lit_shortcut.weights import load_module


def _convolution(in_width: int, width: int) -> list[nn.Module]:
    return [nn.Conv2d(in_width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]


class FashionCNN(nn.Module):
    """Grey images to class logits; the 128 pooled features before the last layer serve the Fréchet distance.

    Args:
        num_classes: classes told apart.
        width: channels of the first stage, doubled at each of the two that follow.
    """

    def __init__(self, num_classes: int = 10, width: int = 32) -> None:
        super().__init__()
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
        """Pooled features (B, 4·width) of uint8 ``images`` (B, 1 or 3, H, W); colour images are averaged to grey."""
        grey = images.float().mean(dim=1, keepdim=True) / 127.5 - 1
        pooled: Tensor = self.body(grey)
        return pooled

    def forward(self, images: Tensor) -> Tensor:
        """Class logits (B, num_classes) of uint8 ``images`` (B, 1 or 3, H, W)."""
        logits: Tensor = self.head(self.dropout(self.features(images)))
        return logits

    @classmethod
    def load(cls, path: Path) -> FashionCNN:
        """The one stored at ``path``, frozen; raises :class:`~lit_shortcut.weights.WeightsError` if it is none."""
        return load_module(cls, path)
