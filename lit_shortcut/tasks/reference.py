"""Reference statistics of real images, so that evaluation needs no images."""

from __future__ import annotations

from pathlib import Path

import lightning as L
from torch import nn

from lit_shortcut.bounds import require_at_least
from lit_shortcut.images import LabelledImages
from lit_shortcut.metrics.reference import FeatureStatistics
from lit_shortcut.precision import KeptDtype, float32_by_default
from lit_shortcut.trials import is_trial, require_writable_file
from lit_shortcut.weights import update_manifest


class ReferenceTask(KeptDtype, L.LightningModule):
    """``predict`` over real images writes mean and covariance of their features; run on one device.

    That is enough for the Fréchet distance; the kernel distance, precision and recall need the features themselves.
    Features are computed in the extractor's own precision, as metrics do, whatever the trainer's.

    Args:
        extractor: network from uint8 images to features, the same as the metrics'.
        path: safetensors file to write; ``manifest.yaml`` beside it gets an entry.
        images: name of the images.
        licence: SPDX identifier of the file.
        num_reference_features: size of the random subset whose features are stored; all if there are fewer images.
    """

    def __init__(
        self,
        extractor: nn.Module,
        path: Path,
        images: str,
        licence: str = "Apache-2.0",
        num_reference_features: int = 0,
    ) -> None:
        super().__init__()
        require_at_least(0, num_reference_features=num_reference_features)
        self.statistics, self.path = FeatureStatistics(extractor, num_reference_features), path
        self.facts = {"images": images, "licence": licence}
        self.extractor = extractor

    def on_predict_start(self) -> None:
        """Check that there is one rank, and that the file can be written.

        Raises:
            ValueError: if there are several ranks, each of which would only count its own images.
            OSError: if the file cannot be written.
        """
        if self.trainer.world_size > 1:
            raise ValueError(f"reference statistics are made on one device, got {self.trainer.world_size}")
        require_writable_file(self.trainer, "predict", self.path)

    def predict_step(self, batch: LabelledImages, batch_idx: int) -> int:
        """Take in one batch; returns the number of images so far."""
        with float32_by_default():
            self.statistics.update(batch.pixels)
        return self.statistics.count

    def on_predict_end(self) -> None:
        """Write the file, unless this was a trial run."""
        if is_trial(self.trainer, "predict"):
            return
        self.statistics.save(self.path, self.facts["images"])
        update_manifest(self.path, self.facts)
