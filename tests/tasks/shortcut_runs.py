"""A small shortcut task, and its runs on a small set."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor

from datamodules.trajectories import TrajectoryDataModule
from lit_shortcut.contracts import Transition
from lit_shortcut.networks.shortcut import ShortcutNet
from lit_shortcut.tasks.shortcut import ShortcutTask
from lit_shortcut.trajectory import read_shard
from lit_shortcut.trajectory.transitions import concatenated, select
from tests.tasks import short_runs
from tests.tiny_trajectories import SPEC, card

QUIET = short_runs.QUIET | {"num_sanity_val_steps": 0}


def network(seed: int | None = None) -> ShortcutNet:
    """As made, which is hold; with ``seed`` all its parameters are random."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0 if seed is None else seed)
        made = ShortcutNet(width=SPEC.width, num_heads=1)
        for parameter in () if seed is None else made.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return made


class Task(ShortcutTask):
    """Set up as a trainer would, and keeps what it logs."""

    def __init__(self, folder: Path, made: ShortcutNet, **arguments: Any) -> None:
        super().__init__(made, **arguments)
        self.data = TrajectoryDataModule(str(folder))
        self.logged: dict[str, Tensor] = {}
        self.stand_in = SimpleNamespace(
            datamodule=self.data,
            current_epoch=0,
            global_step=7,
            log_every_n_steps=4,
            world_size=1,
            precision="32-true",
            strategy=SingleDeviceStrategy("cpu"),
        )
        self.trainer = self.stand_in  # type: ignore[assignment]
        self.setup("fit")

    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        self.logged[name] = value

    def log_dict(self, dictionary: Any, *args: Any, **kwargs: Any) -> None:
        self.logged |= dictionary


def batch_of(folder: Path, window: int = 1, count: int = 9) -> Transition:
    found = card()
    samples = concatenated(list(read_shard(folder, 0, found)))
    starts = found.num_steps - window
    places = [(b, g, s) for b in range(len(samples.tokens)) for g in range(found.branches) for s in range(starts)]
    return select(samples, places[:: len(places) // count][:count], window)


def validate(folder: Path, task: ShortcutTask, **arguments: Any) -> dict[str, float]:
    data = TrajectoryDataModule(str(folder), **({"validation_shards": 2} | arguments))
    trainer = L.Trainer(**QUIET)
    trainer.validate(task, datamodule=data, verbose=False)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}
