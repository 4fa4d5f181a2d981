"""Trajectory sets opened by their datamodule, and the order of what it reads."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from datamodules.trajectories import TrajectoryDataModule
from lit_shortcut.contracts import Transition

IDS = 0  # the channel that holds the sample's id


def make(
    folder: Path | str, *, rank: int = 0, world_size: int = 1, epoch: int = 0, **arguments: Any
) -> TrajectoryDataModule:
    module = TrajectoryDataModule(str(folder), **({"batch_size": 8} | arguments))
    ranks = {"global_rank": rank, "world_size": world_size}
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    module.trainer = SimpleNamespace(**ranks, strategy=strategy, current_epoch=epoch, overfit_batches=0)
    module.setup("fit")
    return module


def names(batch: Transition) -> list[tuple[int, int, float]]:
    """What tells transitions apart: sample, step, and a value that differs between branches."""
    values = zip(batch.features[:, 0, IDS].tolist(), batch.step.tolist(), batch.features[:, 0, 1].tolist(), strict=True)
    return [(int(sample), step, value) for sample, step, value in values]


def order(module: TrajectoryDataModule) -> list[list[tuple[int, int, float]]]:
    return [names(batch.decode()) for batch in module.train_dataloader()]
