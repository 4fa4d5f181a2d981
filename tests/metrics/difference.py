from __future__ import annotations

from torch import Tensor

from lit_shortcut.contracts import Conditions
from lit_shortcut.metrics.images import ImageMean
from lit_shortcut.metrics.paired import PairedMetric


class Difference(PairedMetric, ImageMean):
    """Mean absolute difference of images and originals."""

    higher_is_better = False

    def update(self, images: Tensor, conditions: Conditions, originals: Tensor) -> None:  # type: ignore[override]
        self.add((images.float() - originals.float()).abs().mean(dim=(1, 2, 3)))
