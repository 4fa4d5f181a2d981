from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.cli import ReduceLROnPlateau as MonitoringPlateau
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LinearLR,
    MultiStepLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
)

from datamodules.trajectories import TrajectoryDataModule
from lit_shortcut.callbacks.last_checkpoint import LastCheckpoint
from lit_shortcut.networks.shortcut import ShortcutNet
from lit_shortcut.tasks.shortcut import ShortcutTask
from tests.tiny_trajectories import write_set

Schedule = Callable[[torch.optim.Optimizer], Any]


class Rates(L.Callback):
    """Learning rate of each optimiser step."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_set(tmp_path / "set")
    return tmp_path


def fit(
    folder: Path,
    steps: int,
    schedule: Schedule | None = None,
    *,
    lr: float = 1e-3,
    optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW,
    resume: bool = False,
    **options: Any,
) -> list[float]:
    """Learning rates of the steps of a run whose ``last.ckpt`` is in ``folder``."""
    rates = Rates()
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[rates, LastCheckpoint(folder)],
        **({"max_steps": steps, "limit_val_batches": 0} | options),
    )
    made = ShortcutTask(
        ShortcutNet(width=6, num_heads=1),
        optimizer=lambda parameters: optimizer(parameters, lr=lr),  # type: ignore[call-arg]
        scheduler=schedule,
    )
    checkpoint = folder / "last.ckpt" if resume else None
    data = TrajectoryDataModule(str(folder / "set"), batch_size=8)
    trainer.fit(made, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    return rates.rates


def one_cycle(total_steps: int, max_lr: float = 0.1) -> Schedule:
    return lambda optimizer: OneCycleLR(optimizer, max_lr=max_lr, total_steps=total_steps)


EXTENDED: dict[str, tuple[Schedule, Schedule]] = {
    "one cycle": (one_cycle(6), one_cycle(12)),
    "cosine": (lambda own: CosineAnnealingLR(own, 6), lambda own: CosineAnnealingLR(own, 12)),
    "linear": (lambda own: LinearLR(own, 1, 0, 6), lambda own: LinearLR(own, 1, 0, 12)),
    "earlier milestone": (lambda own: MultiStepLR(own, [9]), lambda own: MultiStepLR(own, [3])),
    "later milestone": (lambda own: MultiStepLR(own, [3]), lambda own: MultiStepLR(own, [9])),
    "in sequence": (
        lambda own: SequentialLR(own, [LinearLR(own, 0.1, 1, 2), CosineAnnealingLR(own, 4)], [2]),
        lambda own: SequentialLR(own, [LinearLR(own, 0.1, 1, 2), CosineAnnealingLR(own, 10)], [2]),
    ),
}


@pytest.mark.parametrize("kind", EXTENDED)
def test_changed_schedule_goes_on_as_if_it_had_been_there_from_the_beginning(folder: Path, kind: str) -> None:
    before, after = EXTENDED[kind]
    fit(folder, 6, before)
    assert fit(folder, 12, after, resume=True) == pytest.approx(fit(folder, 12, after)[6:])


def test_resumed_run_goes_on_with_its_rates_where_nothing_changed(folder: Path) -> None:
    whole = fit(folder, 8, one_cycle(8))
    fit(folder, 3, one_cycle(8))
    assert fit(folder, 8, one_cycle(8), resume=True) == whole[3:]


def test_long_run_resumes_without_a_warning(folder: Path) -> None:
    """Of 40 steps on the interval of ``last.ckpt`` is above 1, which once made Lightning miss the callback's state."""
    fit(folder, 40)
    assert len(fit(folder, 44, resume=True)) == 4


def test_changed_peak_of_the_rate_holds(folder: Path) -> None:
    fit(folder, 4, one_cycle(8))
    resumed = fit(folder, 8, one_cycle(8, max_lr=0.2), resume=True)
    assert resumed == pytest.approx(fit(folder, 8, one_cycle(8, max_lr=0.2))[4:])


def test_changed_rate_holds(folder: Path) -> None:
    assert fit(folder, 2) == [1e-3] * 2
    assert fit(folder, 4, lr=5e-3, resume=True) == pytest.approx([5e-3] * 2)


def test_changed_milestones_hold(folder: Path) -> None:
    fit(folder, 4, lambda optimizer: MultiStepLR(optimizer, [2], gamma=0.1))
    resumed = fit(folder, 8, lambda optimizer: MultiStepLR(optimizer, [2, 6], gamma=0.1), resume=True)
    assert resumed == pytest.approx([1e-4, 1e-4, 1e-5, 1e-5])


def test_other_optimiser_is_refused_by_name(folder: Path) -> None:
    fit(folder, 2)
    with pytest.raises(ValueError, match=r"last\.ckpt.*AdamW.*SGD"):
        fit(folder, 4, optimizer=torch.optim.SGD, resume=True)


def test_schedule_shorter_than_the_run_is_refused_before_it_begins(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"total_steps.*max_steps"):
        fit(folder, 9, one_cycle(8))
    assert not (folder / "last.ckpt").exists()


def test_schedule_without_a_length_is_refused_with_the_key_to_set(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.scheduler.*trainer\.max_steps"):
        fit(folder, -1, one_cycle(-1), max_epochs=1)


PLATEAUS: dict[str, Schedule] = {
    "torch": lambda optimizer: ReduceLROnPlateau(optimizer, mode="max", factor=0.1, patience=0),
    "lightning": lambda optimizer: MonitoringPlateau(
        optimizer, monitor="val/mse_hold", mode="max", factor=0.1, patience=0
    ),
}


@pytest.mark.parametrize("kind", PLATEAUS)
def test_rate_falls_on_a_plateau_of_the_validation(folder: Path, kind: str) -> None:
    every = {"limit_val_batches": 1.0, "val_check_interval": 2, "check_val_every_n_epoch": None}
    rates = fit(folder, 6, PLATEAUS[kind], **every)
    assert rates == pytest.approx([1e-3, 1e-3, 1e-3, 1e-3, 1e-4, 1e-4])  # the second validation is no better


def test_plateau_of_what_is_not_measured_is_refused_by_name(folder: Path) -> None:
    schedule = lambda optimizer: MonitoringPlateau(optimizer, monitor="val/nothing")  # noqa: E731
    with pytest.raises(ValueError, match="val/nothing"):
        fit(folder, 4, schedule, limit_val_batches=1.0, val_check_interval=2, check_val_every_n_epoch=None)


# ---- last.ckpt


def steps_in(path: Path) -> int:
    return int(torch.load(path, weights_only=True)["global_step"])


def test_last_checkpoint_is_the_latest_run_s(folder: Path) -> None:
    fit(folder, 5)
    fit(folder, 3)
    assert steps_in(folder / "last.ckpt") == 3
    assert [path.name for path in folder.glob("*.ckpt")] == ["last.ckpt"]


def test_interval_fits_the_length_of_the_run_and_its_end_is_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[int] = []
    save = L.Trainer.save_checkpoint

    def noted(self: L.Trainer, *arguments: Any, **options: Any) -> None:
        saved.append(self.global_step)
        save(self, *arguments, **options)

    monkeypatch.setattr(L.Trainer, "save_checkpoint", noted)
    fit(folder, 45)
    assert saved == [*range(2, 45, 2), 45]
