"""Train a small CLIP on captioned images, the judge of how images follow their prompts."""

from __future__ import annotations

from collections.abc import Sequence
from math import log
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torch.nn import functional as F
from torch.optim import AdamW
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from lit_shortcut.contracts import CaptionedImages
from lit_shortcut.networks.clip import SmallCLIP
from lit_shortcut.tasks.optimized import OptimizedTask

_MOST = log(100)  # of the logarithm of the learned scale, as in the paper


def contrastive_loss(logits: Tensor, prompts: Sequence[str]) -> Tensor:
    """Symmetric cross-entropy of ``logits`` (B, B), image i by prompt j, made for pairs on the diagonal.

    Images of equal prompts are right for one another's, to equal parts; where all prompts differ, it is the loss of
    arXiv 2103.00020, section 2.3.

    >>> float(contrastive_loss(torch.zeros(2, 2), ["a coat", "a bag"]).exp())
    2.0
    """
    number = {prompt: index for index, prompt in enumerate(dict.fromkeys(prompts))}
    groups = torch.tensor([number[prompt] for prompt in prompts], device=logits.device)
    is_equal = (groups[:, None] == groups).to(logits.dtype)
    targets = is_equal / is_equal.sum(1, keepdim=True)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


class ClipTask(OptimizedTask):
    """Pairs of image and caption are told from the batch's other pairings; every other batch is mirrored.

    Validation and test log, besides the loss, ``class_accuracy``: share of images nearer to the prompt of their own
    class than to those of the others; and the mean score, 100 · cosine, of images with their own captions
    (``score``) and with their neighbours' in the batch (``score_shuffled``).

    Args:
        clip: the network to train.
        class_prompts: one for each class, in the order of the labels.
        optimizer: makes the optimiser from parameters.
        scheduler: makes the learning-rate schedule, by the step.
    """

    def __init__(
        self,
        clip: SmallCLIP,
        class_prompts: list[str],
        optimizer: OptimizerCallable = AdamW,
        scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(optimizer, scheduler)
        self.network: SmallCLIP = clip
        self.class_prompts = class_prompts
        self.accuracy = MulticlassAccuracy(len(class_prompts), average="micro")
        self.score, self.score_shuffled = MeanMetric(), MeanMetric()

    def training_step(self, batch: CaptionedImages, batch_idx: int) -> Tensor:
        """Contrastive loss of one batch."""
        pixels = batch.pixels.flip(-1) if batch_idx % 2 else batch.pixels
        loss = contrastive_loss(self.network(pixels, batch.prompts), batch.prompts)
        self.log("train/loss", loss)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: CaptionedImages, batch_idx: int) -> None:
        """Keep the scale at 100 or below, as the paper does."""
        self.network.clip.logit_scale.data.clamp_(max=_MOST)

    def validation_step(self, batch: CaptionedImages, batch_idx: int) -> None:
        """Measure images kept aside."""
        self._measure("val", batch)

    def test_step(self, batch: CaptionedImages, batch_idx: int) -> None:
        """Measure the test images."""
        self._measure("test", batch)

    def _measure(self, stage: str, batch: CaptionedImages) -> None:
        similarities = self.network.similarities(batch.pixels, batch.prompts)
        logits = similarities * self.network.clip.logit_scale.exp()
        self.accuracy(self.network.similarities(batch.pixels, self.class_prompts), batch.labels)
        self.score(100 * similarities.diagonal())
        self.score_shuffled(100 * similarities.roll(1, dims=1).diagonal())
        values: dict[str, Any] = {
            "loss": contrastive_loss(logits, batch.prompts),
            "class_accuracy": self.accuracy,
            "score": self.score,
            "score_shuffled": self.score_shuffled,
        }
        self.log_dict({f"{stage}/{name}": value for name, value in values.items()}, batch_size=len(batch.labels))
