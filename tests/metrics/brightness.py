"""The smallest image metric, for tests."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import MeanMetric


class Brightness:
    """Mean of all pixels; counts the images it has seen since the last reset."""

    def __init__(self) -> None:
        self.mean = MeanMetric()

    def update(self, images: Tensor, labels: Tensor) -> None:
        assert len(images) == len(labels)
        self.mean.update(images.float())

    def compute(self) -> Tensor:
        value: Tensor = self.mean.compute()
        return value

    def reset(self) -> None:
        self.mean.reset()

    def to(self, device: torch.device) -> None:
        self.mean.to(device)
