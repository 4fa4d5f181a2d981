"""Train the embedded default's image tokenizer."""

from __future__ import annotations

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torch.nn import functional as F
from torch.optim import AdamW

from lit_shortcut.contracts import Conditions, LabelledImages
from lit_shortcut.metrics.images import ImageMetric
from lit_shortcut.networks.tokenizer import FSQTokenizer
from lit_shortcut.tasks.optimized import OptimizedTask


class TokenizerTask(OptimizedTask):
    """Reconstruct images through the quantiser: mean absolute plus mean squared error of pixels in [-1, 1].

    Args:
        tokenizer: the network to train.
        metrics: measures of the reconstructions, by the name ``test`` logs them under.
        optimizer: makes the optimiser from parameters.
        scheduler: makes the learning-rate schedule, by the step.
    """

    def __init__(
        self,
        tokenizer: FSQTokenizer,
        *,
        metrics: dict[str, ImageMetric] | None = None,
        optimizer: OptimizerCallable = AdamW,
        scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(optimizer, scheduler)
        self.network: FSQTokenizer = tokenizer
        self.metrics = metrics or {}

    def training_step(self, batch: LabelledImages, batch_idx: int) -> Tensor:
        """Reconstruction loss of one batch."""
        loss = self._loss(batch)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: LabelledImages, batch_idx: int) -> None:
        """Reconstruction loss of images kept aside."""
        self.log("val/loss", self._loss(batch), prog_bar=True, batch_size=len(batch.labels))

    def on_test_start(self) -> None:
        """Move the metrics to the task's device."""
        for metric in self.metrics.values():
            metric.to(self.device)

    def test_step(self, batch: LabelledImages, batch_idx: int) -> None:
        """Measure the images that codes alone give back: no base with this tokenizer can do better."""
        reconstructions = self.network.decode(self.network.encode(batch.pixels))
        none = torch.zeros_like(batch.labels)  # no run drew these images: neither ids nor seeds
        conditions = Conditions(none, none, batch.labels)
        for metric in self.metrics.values():
            metric.update(reconstructions, conditions)

    def on_test_epoch_end(self) -> None:
        """Log each metric."""
        self.log_dict({f"test/{name}": metric.compute() for name, metric in self.metrics.items()})

    def _loss(self, batch: LabelledImages) -> Tensor:
        pixels = batch.pixels.float() / 127.5 - 1
        reconstructions = self.network(pixels)
        return F.l1_loss(reconstructions, pixels) + F.mse_loss(reconstructions, pixels)
