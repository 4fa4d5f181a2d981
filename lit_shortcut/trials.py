"""Trial runs: Lightning's ``fast_dev_run`` and limited numbers of batches."""

from __future__ import annotations

from typing import Literal

import lightning as L


def is_trial(trainer: L.Trainer, stage: Literal["test", "predict"]) -> bool:
    """Return whether ``trainer`` skips batches, so that no lasting results should be written."""
    limit = trainer.limit_test_batches if stage == "test" else trainer.limit_predict_batches
    return isinstance(limit, int) or limit < 1  # 1 is one batch, 1.0 is all
