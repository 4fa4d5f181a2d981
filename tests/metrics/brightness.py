"""The smallest image metric, for tests."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import MeanMetric

from lit_shortcut.contracts import Conditions


class Brightness:
    """Mean of all pixels; counts the images it has seen since the last reset."""

    def __init__(self) -> None:
        self.mean = MeanMetric()

    def update(self, images: Tensor, conditions: Conditions) -> None:
        assert len(images) == len(conditions.labels)
        self.mean.update(images.float())

    def compute(self) -> Tensor:
        value: Tensor = self.mean.compute()
        return value

    def reset(self) -> None:
        self.mean.reset()

    def to(self, device: torch.device) -> None:
        self.mean.to(device)
