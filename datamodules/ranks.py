"""Which part of the data is whose."""

from __future__ import annotations

import lightning as L


def rank_and_world_size(module: L.LightningDataModule) -> tuple[int, int]:
    """This process's rank among all of ``module``'s trainer; the first of one without a trainer."""
    return (module.trainer.global_rank, module.trainer.world_size) if module.trainer else (0, 1)
