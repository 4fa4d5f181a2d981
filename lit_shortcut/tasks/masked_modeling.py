"""Train a MaskGIT base on images: predict masked tokens from those left (Chang et al., arXiv 2202.04200)."""

from __future__ import annotations

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torch.nn import functional as F
from torch.optim import AdamW

from lit_shortcut.bases.maskgit.transformer import MaskGITTransformer
from lit_shortcut.contracts import ImageTokenizer, LabelledImages
from lit_shortcut.decoding.schedules import share_masked
from lit_shortcut.tasks.optimized import OptimizedTask


class MaskedModelingTask(OptimizedTask):
    """Cross-entropy over the codebook at masked places, the share of masked tokens drawn from the arccos schedule.

    Args:
        transformer: the network to train, from scratch or from loaded weights.
        tokenizer: frozen; turns images into tokens.
        class_drop: share of samples whose class is replaced by the dropped class, for guidance.
        label_smoothing: of the cross-entropy.
        optimizer: makes the optimiser from parameters.
        scheduler: makes the learning-rate schedule, by the step.
    """

    def __init__(
        self,
        transformer: MaskGITTransformer,
        tokenizer: ImageTokenizer,
        class_drop: float = 0.1,
        label_smoothing: float = 0.1,
        optimizer: OptimizerCallable = AdamW,
        scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(optimizer, scheduler)
        self.network: MaskGITTransformer = transformer.train().requires_grad_(True)  # loaded weights come frozen
        self.class_drop, self.label_smoothing = class_drop, label_smoothing
        self.tokenizer = tokenizer

    def training_step(self, batch: LabelledImages, batch_idx: int) -> Tensor:
        """Loss of one batch."""
        loss, _ = self._loss(batch, None)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: LabelledImages, batch_idx: int) -> None:
        """Loss and token accuracy on images kept aside, with the same masks at each validation."""
        generator = torch.Generator(batch.pixels.device).manual_seed(batch_idx)
        loss, accuracy = self._loss(batch, generator)
        self.log_dict({"val/loss": loss, "val/token_accuracy": accuracy}, prog_bar=True, batch_size=len(batch.labels))

    def _loss(self, batch: LabelledImages, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            codes = self.tokenizer.encode(batch.pixels)
        draws = torch.rand(len(codes), codes.shape[1] + 2, device=codes.device, generator=generator)
        is_masked = draws[:, 2:] < share_masked("arccos", draws[:, :1])
        is_dropped = draws[:, 1] < self.class_drop
        classes = self.network.class_ids(batch.labels).masked_fill(is_dropped, self.network.dropped_class_id)
        features = self.network(codes.masked_fill(is_masked, self.network.mask_id), classes)
        logits = self.network.interface().logits(features)[is_masked]
        loss = F.cross_entropy(logits, codes[is_masked], label_smoothing=self.label_smoothing)
        return loss, (logits.argmax(-1) == codes[is_masked]).float().mean()
