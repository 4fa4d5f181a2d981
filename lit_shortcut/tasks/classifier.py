"""Train the embedded default's classifier."""

from __future__ import annotations

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torch.nn import functional as F
from torch.optim import AdamW
from torchmetrics.classification import MulticlassAccuracy

from lit_shortcut.contracts import LabelledImages
from lit_shortcut.networks.classifier import FashionCNN
from lit_shortcut.tasks.optimized import OptimizedTask


class ClassifierTask(OptimizedTask):
    """Cross-entropy with label smoothing; half of the training images are mirrored.

    Args:
        classifier: the network to train.
        num_classes: classes told apart.
        optimizer: makes the optimiser from parameters.
        scheduler: makes the learning-rate schedule, by the step.
    """

    def __init__(
        self,
        classifier: FashionCNN,
        num_classes: int = 10,
        optimizer: OptimizerCallable = AdamW,
        scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(optimizer, scheduler)
        self.network = classifier
        self.accuracy = MulticlassAccuracy(num_classes, average="micro")

    def training_step(self, batch: LabelledImages, batch_idx: int) -> Tensor:
        """Cross-entropy of one batch, mirrored as a whole every other time."""
        pixels = batch.pixels.flip(-1) if batch_idx % 2 else batch.pixels
        loss = F.cross_entropy(self.network(pixels), batch.labels, label_smoothing=0.1)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: LabelledImages, batch_idx: int) -> None:
        """Accuracy on images kept aside."""
        self.accuracy(self.network(batch.pixels), batch.labels)
        self.log("val/accuracy", self.accuracy, prog_bar=True, batch_size=len(batch.labels))

    def test_step(self, batch: LabelledImages, batch_idx: int) -> None:
        """Accuracy on the test images."""
        self.accuracy(self.network(batch.pixels), batch.labels)
        self.log("test/accuracy", self.accuracy, batch_size=len(batch.labels))
