from __future__ import annotations

from pathlib import Path

import lightning as L
import pytest
import wandb
from lightning.pytorch.loggers import CSVLogger, WandbLogger

from lit_shortcut.callbacks.wandb_axes import WandbAxes
from tests.wandb_offline import read_run


def test_wandb_plots_metrics_over_optimiser_steps_and_keeps_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(project="test", save_dir=tmp_path)
    WandbAxes().on_fit_start(L.Trainer(accelerator="cpu", logger=logger), L.LightningModule())
    wandb.finish()
    wandb.teardown()
    (folder,) = tmp_path.glob("wandb/offline-run-*")
    axes = read_run(folder).axes
    best = {"val/mse": "min", "val/gain": "max", "val/head_kl": "min", "val/token_agreement": "max"}
    assert {name: axes[name] for name in best} == {name: ("trainer/global_step", {kept}) for name, kept in best.items()}
    assert axes["sampling/*"].step == "trainer/global_step"


def test_other_loggers_are_left_alone(tmp_path: Path) -> None:
    trainer = L.Trainer(accelerator="cpu", logger=CSVLogger(tmp_path))
    WandbAxes().on_fit_start(trainer, L.LightningModule())
    assert list(tmp_path.iterdir()) == []
