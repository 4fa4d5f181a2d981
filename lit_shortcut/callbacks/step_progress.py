"""A progress bar over the steps of the decoding loop."""

from __future__ import annotations

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lit_shortcut.tasks.generating import GenerateTask


class StepProgress(ProgressBar):
    """Show how many steps of the decoding loop are done, over all batches of this rank; on the first rank only."""

    def __init__(self) -> None:
        super().__init__()
        self.is_enabled = True
        self.bar: Progress | None = None

    def enable(self) -> None:
        """Show the bar."""
        self.is_enabled = True

    def disable(self) -> None:
        """Show nothing."""
        self.is_enabled = False

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin at 0 of all batches' steps."""
        assert isinstance(pl_module, GenerateTask)
        if not self.is_enabled:
            return
        batches = sum(int(count) for count in trainer.num_predict_batches)
        columns = (TextColumn("drawing"), BarColumn(), MofNCompleteColumn(), TextColumn("steps"), TimeRemainingColumn())
        self.bar = Progress(*columns)
        steps = self.bar.add_task("steps", total=batches * pl_module.steps_per_batch)
        pl_module.on_step = lambda: self.bar.advance(steps) if self.bar else None
        self.bar.start()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave the bar as it stands."""
        self._stop()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave the bar as it stands."""
        self._stop()

    def _stop(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
