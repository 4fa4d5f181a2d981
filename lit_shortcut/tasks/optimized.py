"""What every trained task shares: an optimiser and a schedule chosen in YAML."""

from __future__ import annotations

import lightning as L
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch.optim import AdamW


class OptimizedTask(L.LightningModule):
    """A LightningModule that optimises its trainable parameters; the schedule advances once an optimiser step.

    Args:
        optimizer: makes the optimiser from parameters.
        scheduler: makes the learning-rate schedule from the optimiser; None keeps the rate.
    """

    def __init__(self, optimizer: OptimizerCallable = AdamW, scheduler: LRSchedulerCallable | None = None) -> None:
        super().__init__()
        self.optimizer, self.scheduler = optimizer, scheduler

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Optimiser over what requires gradients, and the schedule, by the step."""
        optimizer = self.optimizer(p for p in self.parameters() if p.requires_grad)
        if self.scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.scheduler(optimizer), "interval": "step"},
        }
