"""Trainers of short runs on the CPU that print and log nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
"""Arguments of a trainer that keeps nothing."""


def short_trainer(folder: Path, **settings: Any) -> L.Trainer:
    """A trainer of one epoch that works in ``folder``."""
    return L.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
