"""Metrics that compare each image with its original, such as the one that vanilla draws from the same seed.

A distance between sets says whether accelerated images are as good as vanilla's; these say whether they are the same
images. Both are drawn with the same noise, so that a difference is the acceleration's, and a hundred images
show which predictor is nearer where a Fréchet distance needs thousands.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from lit_shortcut.contracts import Conditions
from lit_shortcut.metrics.images import ImageMean, ImageMetric


class PairedMetric(ImageMetric):
    """Metric whose ``update`` also takes the image's ``originals``, uint8 (B, 3, H, W).

    ``test`` and sampling during fit give those of vanilla at the evaluation's N, from the same seeds and conditions; a
    tokenizer's ``test`` gives the images it reconstructs.
    """

    def update(self, images: Tensor, conditions: Conditions, originals: Tensor) -> None:  # type: ignore[override]
        """Add uint8 ``images`` (B, 3, H, W), made for ``conditions``, to be compared with ``originals``."""
        raise NotImplementedError


class StructuralSimilarity(PairedMetric, ImageMean):
    """Mean structural similarity of images and originals, SSIM (Wang et al., IEEE TIP 13(4), 2004), 1 where equal."""

    higher_is_better = True

    def update(self, images: Tensor, conditions: Conditions, originals: Tensor) -> None:  # type: ignore[override]
        """Add uint8 ``images`` (B, 3, H, W), to be compared with ``originals`` of the same shape."""
        with torch.autocast(images.device.type, enabled=False):  # its convolutions would run in bfloat16
            found = structural_similarity_index_measure(
                images.float(), originals.float(), data_range=255.0, reduction="none"
            )
        assert isinstance(found, Tensor)
        self.add(found)


def are_paired(metrics: Mapping[str, ImageMetric]) -> bool:
    """Return whether any of ``metrics`` needs originals."""
    return any(isinstance(metric, PairedMetric) for metric in metrics.values())
