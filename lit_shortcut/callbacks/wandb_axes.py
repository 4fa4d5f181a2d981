"""Axes and summaries of the metrics on W&B."""

from __future__ import annotations

import lightning as L
from lightning.pytorch.loggers import WandbLogger

_BEST = {
    "val/mse": "min",
    "val/gain": "max",
    "val/head_kl": "min",
    "val/token_agreement": "max",
    "sampling/*": "last",
}


class WandbAxes(L.Callback):
    """Plot training and sampling metrics over optimiser steps, and keep the best value in the run's summary.

    Does nothing if W&B is not among the loggers.
    """

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Define the metrics once the run exists; loggers of other ranks are dummies."""
        if not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                for name, summary in _BEST.items():
                    logger.experiment.define_metric(name, step_metric="trainer/global_step", summary=summary)
