"""Rank and world size of a data module's trainer."""

from __future__ import annotations

import lightning as L


def rank_and_world_size(module: L.LightningDataModule) -> tuple[int, int]:
    """Return rank and world size of ``module``'s trainer; (0, 1) without a trainer."""
    return (module.trainer.global_rank, module.trainer.world_size) if module.trainer else (0, 1)
