"""``last.ckpt``: always the latest run's, written often enough for its length."""

from __future__ import annotations

import warnings
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_shortcut.bounds import require_at_least

_TIMES = 20  # in a run
_MOST_STEPS = 1000  # between two


class LastCheckpoint(ModelCheckpoint):
    """Write ``last.ckpt`` twenty times in a run, every 1,000 steps at least, and at the end.

    A run in a folder where another one wrote takes its place. ``--ckpt_path last`` goes on from there.

    Args:
        dirpath: folder.
        every_n_train_steps: optimiser steps between two; None fits them to the run.
    """

    def __init__(self, dirpath: Path, every_n_train_steps: int | None = None) -> None:
        if every_n_train_steps is not None:
            require_at_least(1, every_n_train_steps=every_n_train_steps)
        super().__init__(
            dirpath,
            self.CHECKPOINT_NAME_LAST,
            every_n_train_steps=every_n_train_steps or 1,
            enable_version_counter=False,
        )
        self._is_fitted = every_n_train_steps is None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """As Lightning does, without its warning that files are there: to take their place is what is meant."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
            super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Fit the interval to the run."""
        super().on_train_start(trainer, pl_module)
        if self._is_fitted:
            self._every_n_train_steps = int(max(1, min(_MOST_STEPS, trainer.estimated_stepping_batches // _TIMES)))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the end."""
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
