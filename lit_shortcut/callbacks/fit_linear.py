"""Fit the linear predictor on the validation trajectories."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lit_shortcut.acceleration.linear import inner_products, save
from lit_shortcut.tasks.ranks import sum_over_ranks
from lit_shortcut.tasks.shortcut import ShortcutTask
from lit_shortcut.trials import is_trial, require_writable_file


class FitLinear(L.Callback):
    """Write the file that :class:`~lit_shortcut.acceleration.linear.Linear` reads. Run by ``lit-shortcut validate``.

    Args:
        path: safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._products: Tensor | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check that the file can be written."""
        require_writable_file(trainer, "validate", self.path)

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: int
    ) -> None:
        """Add the batch's inner products."""
        assert isinstance(pl_module, ShortcutTask)
        added = inner_products(batch, pl_module.ends.interface, pl_module.device)
        self._products = added if self._products is None else self._products + added

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the sums over all ranks on the first rank, unless this is a trial run."""
        assert isinstance(pl_module, ShortcutTask)
        num_steps = len(pl_module.counts)
        own = torch.zeros(num_steps, num_steps, num_steps).double() if self._products is None else self._products
        products = sum_over_ranks(own.to(pl_module.device)).cpu()
        if trainer.is_global_zero and not trainer.sanity_checking and not is_trial(trainer, "validate"):
            save(self.path, products, pl_module.ends.fingerprint)
        self._products = None
