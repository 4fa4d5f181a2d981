"""Trial runs: Lightning's ``fast_dev_run`` and limited numbers of batches. They write nothing that lasts."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import lightning as L
from lightning.pytorch.utilities import rank_zero_info

from lit_shortcut.weights import require_writable

Stage = Literal["fit", "validate", "test", "predict"]


def is_trial(trainer: L.Trainer, stage: Stage) -> bool:
    """Return whether ``trainer`` leaves out batches, so that nothing that lasts should be written.

    In ``fit`` only ``fast_dev_run`` does: there a limit is the length of an epoch.
    """
    if stage == "fit":
        return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]  # Lightning sets it late
    limits = {
        "validate": trainer.limit_val_batches,
        "test": trainer.limit_test_batches,
        "predict": trainer.limit_predict_batches,
    }
    limit = limits[stage]
    return isinstance(limit, int) or limit < 1  # 1 is one batch, 1.0 is all


def report_trial(place: Path) -> None:
    """Log that nothing is written to ``place``, since the run is a trial."""
    rank_zero_info(f"a trial run: nothing is written to {place}")


def require_writable_file(trainer: L.Trainer, stage: Stage, path: Path) -> None:
    """Check on the first rank that ``path`` can be written, or log that a trial run writes nothing there.

    Raises:
        OSError: naming the folder, if it cannot be created or written.
    """
    if is_trial(trainer, stage):
        report_trial(path)
    elif trainer.is_global_zero:
        require_writable(path.parent)
