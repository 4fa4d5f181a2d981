"""The smallest image metric, for tests."""

from __future__ import annotations

from torch import Tensor

from lit_shortcut.contracts import Conditions
from lit_shortcut.metrics.images import ImageMean


class Brightness(ImageMean):
    """Mean of all pixels; counts the images it has seen since the last reset."""

    higher_is_better = True

    def update(self, images: Tensor, conditions: Conditions) -> None:
        assert len(images) == len(conditions.labels)
        self.add(images)
