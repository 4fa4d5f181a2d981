"""What a compact encoding costs: a shortcut trained from each, validated on the features as the base computed them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR

from benchmarks.decodings import decoding_of
from benchmarks.table import Table
from benchmarks.training import SIZES
from datamodules.conditions import ClassLabels
from datamodules.trajectories import TrajectoryDataModule
from lit_shortcut.callbacks.trajectory_writer import TrajectoryWriter
from lit_shortcut.fashion.embedded import fashion
from lit_shortcut.losses import HeadKL, Loss, MaskedMSE
from lit_shortcut.networks.shortcut import ShortcutNet
from lit_shortcut.tasks.recording import RecordingTask
from lit_shortcut.tasks.shortcut import ShortcutTask
from lit_shortcut.trajectory import Card, read_shard, write_shard
from lit_shortcut.trajectory.index import finished_shards
from lit_shortcut.trajectory.interface_file import load_interface, save_interface
from lit_shortcut.trajectory.transitions import concatenated

NUM_IMAGES, SHARD, VALIDATION_SHARDS, STEPS = 256, 32, 2, 300
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}


def measure() -> Table:
    """Record once in float32, write the same samples in each encoding, train from each with the same seed."""
    with TemporaryDirectory() as scratch:
        exact = Path(scratch) / "float32"
        trainer = L.Trainer(**QUIET, callbacks=[TrajectoryWriter(exact, "float32")])
        task = RecordingTask(fashion("checkpoints/fashion"), decoding=decoding_of("fashion"))
        trainer.predict(task, datamodule=ClassLabels(NUM_IMAGES, SHARD, seed=1), return_predictions=False)
        errors, sizes = {}, {}
        for dtype in ("float32", "bfloat16", "int8"):
            folder = Path(scratch) / dtype
            if folder != exact:
                convert(exact, folder, dtype)
            sizes[dtype] = sum(finished_shards(folder, Card.read(folder)).values()) / NUM_IMAGES / 2
            errors[dtype] = _trained(folder, exact)
    rows = [
        {
            "encoding": dtype,
            "MB a trajectory branch": sizes[dtype] / 1e6,
            "val/mse": error["val/mse"],
            "over float32, %": 100 * (error["val/mse"] / errors["float32"]["val/mse"] - 1),
            "val/gain": error["val/gain"],
            "val/rollout_mse_4 over float32, %": 100
            * (error["val/rollout_mse_4"] / errors["float32"]["val/rollout_mse_4"] - 1),
        }
        for dtype, error in errors.items()
    ]
    note = (
        f"The embedded default: {NUM_IMAGES} trajectories, recorded once in float32 and written in each encoding; the "
        f"shortcut of configs/fashion/fit.yaml trained for {STEPS} steps from each with the same seed and order, all "
        "validated on the float32 shards kept aside."
    )
    return Table("Price of the encoding", rows, note)


def convert(source: Path, folder: Path, encoding: str) -> None:
    """Write the samples of the set at ``source`` to ``folder`` with features in ``encoding``."""
    card = Card.read(source)
    made = replace(card, encoding=encoding)
    made.write(folder)
    save_interface(folder, load_interface(source, card))
    for index in range(card.num_shards):
        write_shard(folder, index, concatenated(list(read_shard(source, index, card))), made)


def _trained(folder: Path, exact: Path) -> dict[str, float]:
    """What validation on ``exact`` measures after training on ``folder``."""
    L.seed_everything(0, verbose=False)

    def scheduled(optimizer: torch.optim.Optimizer) -> OneCycleLR:
        return OneCycleLR(optimizer, max_lr=2e-3, total_steps=STEPS, pct_start=0.05)

    def adamw(parameters: Any) -> AdamW:
        return AdamW(parameters, lr=1e-3, weight_decay=1e-2)

    network: nn.Module = ShortcutNet(**SIZES[0].network)  # of the fashion default
    losses: dict[str, Loss] = {"mse": MaskedMSE(), "kl": HeadKL()}
    task = ShortcutTask(network, losses=losses, optimizer=adamw, scheduler=scheduled)  # type: ignore[arg-type]
    trainer = L.Trainer(**QUIET, max_steps=STEPS, limit_val_batches=0, gradient_clip_val=1.0)
    spans: dict[str, Any] = {"max_gap": 9, "guided": True, "validation_shards": VALIDATION_SHARDS}
    recorded = TrajectoryDataModule(str(folder), 64, **spans)
    trainer.fit(task, datamodule=recorded)
    judge = L.Trainer(**QUIET)
    data = TrajectoryDataModule(str(exact), **spans)
    (measured,) = judge.validate(task, datamodule=data, verbose=False)
    return {name: float(value) for name, value in measured.items()}
