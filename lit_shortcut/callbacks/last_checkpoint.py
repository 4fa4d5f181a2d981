"""``last.ckpt``: the latest run's checkpoint, written at intervals that suit its length."""

from __future__ import annotations

import warnings
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_shortcut.bounds import require_at_least

_TIMES = 20  # checkpoints in a run
_MOST_STEPS = 1000  # between two checkpoints


class LastCheckpoint(ModelCheckpoint):
    """Write ``last.ckpt`` twenty times in a run, at least every 1,000 steps, and at the end.

    A later run in the same folder overwrites it. ``--ckpt_path last`` resumes from it.

    Args:
        dirpath: folder of the checkpoint.
        every_n_train_steps: optimiser steps between two checkpoints; None adapts them to the run.
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

    @property
    def state_key(self) -> str:
        """Key of its state in checkpoints; Lightning's contains the interval, which is adapted after resuming."""
        return type(self).__qualname__

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Set up as Lightning does, without its warning about existing files: overwriting them is intended.

        What a killed run left of a checkpoint is deleted.
        """
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
            super().setup(trainer, pl_module, stage)
        if stage == "fit" and trainer.is_global_zero:
            for part in Path(self.dirpath or "").glob(f".{self.CHECKPOINT_NAME_LAST}.*"):
                part.unlink()  # of a run that was killed

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Adapt the interval to the run's length."""
        super().on_train_start(trainer, pl_module)
        if self._is_fitted:
            self._every_n_train_steps = int(max(1, min(_MOST_STEPS, trainer.estimated_stepping_batches // _TIMES)))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the run's final state."""
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
