"""Train the embedded default's image tokenizer."""

from __future__ import annotations

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torch.nn import functional as F
from torch.optim import AdamW

from lit_shortcut.contracts import LabelledImages
from lit_shortcut.networks.tokenizer import FSQTokenizer
from lit_shortcut.tasks.optimized import OptimizedTask


class TokenizerTask(OptimizedTask):
    """Reconstruct images through the quantiser: mean absolute plus mean squared error of pixels in [-1, 1].

    Args:
        tokenizer: the network to train.
        optimizer: makes the optimiser from parameters.
        scheduler: makes the learning-rate schedule, by the step.
    """

    def __init__(
        self,
        tokenizer: FSQTokenizer,
        optimizer: OptimizerCallable = AdamW,
        scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(optimizer, scheduler)
        self.network = tokenizer

    def training_step(self, batch: LabelledImages, batch_idx: int) -> Tensor:
        """Reconstruction loss of one batch."""
        loss = self._loss(batch)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: LabelledImages, batch_idx: int) -> None:
        """Reconstruction loss of images kept aside."""
        self.log("val/loss", self._loss(batch), prog_bar=True, batch_size=len(batch.labels))

    def _loss(self, batch: LabelledImages) -> Tensor:
        pixels = batch.pixels.float() / 127.5 - 1
        reconstructions = self.network(pixels)
        return F.l1_loss(reconstructions, pixels) + F.mse_loss(reconstructions, pixels)
