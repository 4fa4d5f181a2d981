"""Progress of a run: a bar in a terminal, lines of text elsewhere, so that log files show it, too."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from lightning.pytorch.utilities import rank_zero_info


def progress_bar() -> ProgressBar:
    """Return the bar where standard output is a terminal, else the lines."""
    return TerminalProgress() if sys.stdout.isatty() else PlainProgress()


class TerminalProgress(RichProgressBar):
    """Lightning's bar, which shows ``Epoch 7``, not ``Epoch 7/-2``, in a run without ``max_epochs``."""

    def _get_train_description(self, current_epoch: int) -> str:
        unbounded = self.trainer.max_epochs in (None, -1)
        return f"Epoch {current_epoch}".ljust(10) if unbounded else super()._get_train_description(current_epoch)


class PlainProgress(ProgressBar):
    """Write a line when a stage begins and ends and every ``every_seconds`` in between, on the first rank.

    Args:
        every_seconds: least time between two lines.
        clock: returns the time in seconds.
    """

    def __init__(self, every_seconds: float = 20.0, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self.every_seconds, self.clock, self.is_enabled = every_seconds, clock, True
        self.started: dict[str, tuple[float, int]] = {}  # time, and what was done before
        self.said = 0.0

    def enable(self) -> None:
        """Write lines."""
        self.is_enabled = True

    def disable(self) -> None:
        """Write nothing."""
        self.is_enabled = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the number of steps."""
        self._begin("fit", trainer.estimated_stepping_batches, "steps", before=trainer.global_step)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Log the number of this step, with the metrics that a bar would show."""
        shown = {name: value for name, value in self.get_metrics(trainer, pl_module).items() if name != "v_num"}
        metrics = "".join(f", {name} {value:.4g}" for name, value in shown.items() if isinstance(value, float))
        self._say("fit", trainer.global_step, trainer.estimated_stepping_batches, "steps", metrics)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the number of batches."""
        self._begin("validate", sum(trainer.num_val_batches), "batches")

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *of: Any) -> None:
        """Log the number of this batch."""
        self._batch_ended("validate", trainer.num_val_batches, *of)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the number of batches."""
        self._begin("test", sum(trainer.num_test_batches), "batches")

    def on_test_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *of: Any) -> None:
        """Log the number of this batch."""
        self._batch_ended("test", trainer.num_test_batches, *of)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the number of batches."""
        self._begin("predict", sum(trainer.num_predict_batches), "batches")

    def on_predict_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *of: Any) -> None:
        """Log the number of this batch."""
        self._batch_ended("predict", trainer.num_predict_batches, *of)

    def _batch_ended(
        self, stage: str, counts: list[int | float], outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._say(stage, int(sum(counts[:dataloader_idx])) + batch_idx + 1, sum(counts), "batches")

    def _begin(self, stage: str, total: float, unit: str, before: int = 0) -> None:
        """Start the clock of ``stage``, of which ``before`` was done by an earlier run."""
        self.said = self.clock()
        self.started[stage] = self.said, before
        if self.is_enabled and not self.trainer.sanity_checking:
            rank_zero_info(f"{stage}: {_shown(total)} {unit}")

    def _say(self, stage: str, done: int, total: float, unit: str, metrics: str = "") -> None:
        now = self.clock()
        is_due = done >= total or now - self.said >= self.every_seconds
        if not is_due or not self.is_enabled or self.trainer.sanity_checking:
            return
        start, before = self.started[stage]
        self.said, passed, own = now, now - start, max(1, done - before)
        left = f", {_duration(passed / own * (total - done))} left" if done < total < float("inf") else ""
        rank_zero_info(f"{stage}: {done} of {_shown(total)} {unit}, {_duration(passed)} passed{left}{metrics}")


def _shown(total: float) -> str:
    return "unknown" if total == float("inf") else f"{total:.0f}"


def _duration(seconds: float) -> str:
    """Format ``seconds`` for people.

    >>> _duration(42.4), _duration(754), _duration(7390)
    ('0:42', '12:34', '2:03:10')
    """
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
