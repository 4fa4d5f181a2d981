from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lit_shortcut.callbacks.ema import ModuleEMA
from tests.reads import Reads

BATCHES = 4  # per epoch
Weights = dict[str, Tensor]


class Task(L.LightningModule):
    """A regression whose network also has a buffer, beside a frozen teacher."""

    def __init__(self, explode_at: int | None = None) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
            self.teacher = nn.Linear(3, 2).requires_grad_(False)
        self.explode_at = explode_at
        self.seen_by_validation: list[tuple[int, Weights]] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return nn.functional.mse_loss(self.network(batch), self.teacher(batch))

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.seen_by_validation.append((self.global_step, weights(self)))
        if self.explode_at is not None and self.global_step >= self.explode_at:
            raise ArithmeticError("on purpose")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.network.parameters(), lr=0.05)


class Recorder(Callback):
    """Raw weights after every batch, and what a callback finds at the end of a validation epoch."""

    def __init__(self) -> None:
        self.raw: list[Weights] = []
        self.at_validation_epoch_end: list[Weights] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.raw.append(weights(pl_module))

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.at_validation_epoch_end.append(weights(pl_module))


def weights(task: L.LightningModule) -> Weights:
    return {name: parameter.detach().clone() for name, parameter in task.get_submodule("network").named_parameters()}


def same(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def of_network(state: dict[str, Tensor], task: L.LightningModule) -> Weights:
    return {name: state[f"network.{name}"] for name in weights(task)}


def averages(raw: list[Weights], decay: float, warmup: bool) -> list[Weights]:
    """The average after each update, by hand in double precision."""
    average = {name: tensor.double() for name, tensor in raw[0].items()}
    history = [dict(average)]
    for update, now in enumerate(raw[1:], start=1):
        keep = min(decay, (1 + update) / (10 + update)) if warmup else decay
        average = {name: keep * average[name] + (1 - keep) * tensor.double() for name, tensor in now.items()}
        history.append(average)
    return history


def assert_close(ours: Weights, expected: Weights) -> None:
    for name, tensor in expected.items():
        torch.testing.assert_close(ours[name].double(), tensor, rtol=1e-5, atol=1e-6)


def batches(count: int = BATCHES) -> DataLoader[Tensor]:
    data = torch.randn(count, 8, 3, generator=torch.Generator().manual_seed(1))
    return DataLoader(data, batch_size=None)  # type: ignore[arg-type]


def trainer(folder: Path, *callbacks: Callback, **options: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    saves = any(isinstance(callback, Checkpoint) for callback in callbacks)
    defaults = {"accelerator": "cpu", "devices": 1, "max_epochs": 2, "enable_checkpointing": saves}
    return L.Trainer(default_root_dir=folder, callbacks=list(callbacks), **(quiet | defaults | options))


def fit(
    folder: Path, *callbacks: Callback, task: Task | None = None, ckpt_path: Path | None = None, **options: Any
) -> tuple[Task, Recorder, L.Trainer]:
    task, recorder = task or Task(), Recorder()
    run = trainer(folder, recorder, *callbacks, **options)
    run.fit(task, batches(), batches(1), ckpt_path=ckpt_path)
    return task, recorder, run


@pytest.mark.parametrize("warmup", [True, False])
@pytest.mark.parametrize("decay", [0.9, 0.3])
def test_average_equals_the_one_computed_by_hand(tmp_path: Path, decay: float, warmup: bool) -> None:
    task, recorder, _ = fit(tmp_path, ModuleEMA(decay=decay, warmup=warmup))
    expected = averages(recorder.raw, decay, warmup)[-1]
    assert_close(weights(task), expected)  # after fit the network holds the average
    assert not torch.allclose(expected["0.weight"].float(), recorder.raw[-1]["0.weight"], atol=1e-4)


def test_update_waits_for_no_device(tmp_path: Path) -> None:
    task, ema = Task(), ModuleEMA(decay=0.9)
    run = trainer(tmp_path, ema)
    ema.setup(run, task, "fit")
    ema.on_fit_start(run, task)
    for _ in range(3):
        with Reads() as mode:
            ema._update(task)
        assert mode.count == 0


def test_average_of_bfloat16_weights_is_kept_in_float32(tmp_path: Path) -> None:
    class Half(Task):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.network(batch).square().mean()

        def validation_step(self, batch: Tensor, batch_idx: int) -> None: ...

    ema = ModuleEMA(decay=0.9)
    task, recorder, _ = fit(tmp_path, ema, task=Half(), precision="bf16-true", val_check_interval=2)
    expected = averages(recorder.raw, 0.9, warmup=True)[-1]
    assert ema._average_model is not None
    average = dict(ema._average_model.module.named_parameters())
    assert {parameter.dtype for parameter in average.values()} == {torch.float32}
    assert_close({name: parameter.detach() for name, parameter in average.items()}, expected)
    assert {weight.dtype for weight in weights(task).values()} == {torch.bfloat16}


def test_validation_sees_the_average_and_training_goes_on_with_the_raw_weights(tmp_path: Path) -> None:
    task, recorder, _ = fit(tmp_path, ModuleEMA(decay=0.9), val_check_interval=2)
    _, without, _ = fit(tmp_path, val_check_interval=2)
    assert len(recorder.raw) == len(without.raw) == 2 * BATCHES
    assert all(same(ours, theirs) for ours, theirs in zip(recorder.raw, without.raw, strict=True))
    expected = averages(recorder.raw, 0.9, warmup=True)
    after_training = [(step, seen) for step, seen in task.seen_by_validation if step > 0]
    assert [step for step, _ in after_training] == [2, 4, 6, 8]
    for (step, seen), at_end in zip(after_training, recorder.at_validation_epoch_end[1:], strict=True):
        assert_close(seen, expected[step - 1])
        assert same(at_end, seen)  # callbacks that sample at the end of the epoch use the average too


def test_sanity_check_before_any_update_sees_the_initial_weights(tmp_path: Path) -> None:
    task, _, _ = fit(tmp_path, ModuleEMA())
    step, seen = task.seen_by_validation[0]
    assert step == 0
    assert same(seen, weights(Task()))


def test_average_follows_optimiser_steps_not_batches(tmp_path: Path) -> None:
    ema = ModuleEMA(decay=0.9)
    task, recorder, run = fit(tmp_path, ema, accumulate_grad_batches=2)
    assert run.global_step == BATCHES
    assert_close(weights(task), averages(recorder.raw[1::2], 0.9, warmup=True)[-1])


def test_second_fit_averages_anew(tmp_path: Path) -> None:
    ema, task = ModuleEMA(decay=0.9), Task()
    fit(tmp_path, ema, task=task)
    _, recorder, _ = fit(tmp_path, ema, task=task)
    assert_close(weights(task), averages(recorder.raw, 0.9, warmup=True)[-1])


def test_checkpoint_holds_the_average_and_loads_without_pickled_code(tmp_path: Path) -> None:
    checkpoints = ModelCheckpoint(tmp_path / "checkpoints", save_top_k=-1)
    task, recorder, _ = fit(tmp_path, ModuleEMA(decay=0.9), checkpoints)
    expected = averages(recorder.raw, 0.9, warmup=True)
    for epoch in (0, 1):
        step = (epoch + 1) * BATCHES
        path = tmp_path / "checkpoints" / f"epoch={epoch}-step={step}.ckpt"
        checkpoint = torch.load(path, weights_only=True)
        assert_close(of_network(checkpoint["state_dict"], task), expected[step - 1])
        assert same(of_network(checkpoint["current_model_state"], task), recorder.raw[step - 1])
        assert checkpoint["averaging_state"]["n_averaged"] == step
        assert torch.equal(checkpoint["state_dict"]["teacher.weight"], task.teacher.weight)
        assert checkpoint["state_dict"].keys() == task.state_dict().keys()
        assert all(name.startswith("network.") for name in checkpoint["current_model_state"])
        fresh = Task()
        fresh.load_state_dict(checkpoint["state_dict"])
        assert_close(weights(fresh), expected[step - 1])


@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # runs are kept apart on purpose
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path: Path) -> None:
    def checkpoint_of(folder: str) -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path / folder, filename="{epoch}", save_top_k=-1)

    whole, recorder, _ = fit(tmp_path, ModuleEMA(decay=0.9), checkpoint_of("whole"), max_epochs=4)
    fit(tmp_path, ModuleEMA(decay=0.9), checkpoint_of("half"), max_epochs=2)
    resumed, second_half, _ = fit(
        tmp_path,
        ModuleEMA(decay=0.9),
        checkpoint_of("rest"),
        ckpt_path=tmp_path / "half" / "epoch=1.ckpt",
        max_epochs=4,
    )
    assert len(second_half.raw) == 2 * BATCHES
    assert all(same(ours, theirs) for ours, theirs in zip(second_half.raw, recorder.raw[2 * BATCHES :], strict=True))
    assert same(weights(resumed), weights(whole))
    ours, theirs = (torch.load(tmp_path / name / "epoch=3.ckpt", weights_only=True) for name in ("rest", "whole"))
    for key in ("state_dict", "current_model_state", "averaging_state"):
        assert same(ours[key], theirs[key]), key
    for state, other in zip(*(c["optimizer_states"][0]["state"].values() for c in (ours, theirs)), strict=True):
        assert same(state, other)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # as above
def test_finished_run_that_is_resumed_leaves_the_average(tmp_path: Path) -> None:
    """Lightning then trains nothing, and calls no hook at the end of training."""
    steps = {"max_epochs": -1, "max_steps": 2 * BATCHES}

    def checkpoint_of(folder: str) -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path / folder, filename="{step}", every_n_train_steps=2 * BATCHES)

    whole, recorder, _ = fit(tmp_path, ModuleEMA(decay=0.9), checkpoint_of("whole"), **steps)
    path = tmp_path / "whole" / f"step={2 * BATCHES}.ckpt"
    resumed, nothing, _ = fit(tmp_path, ModuleEMA(decay=0.9), checkpoint_of("rest"), ckpt_path=path, **steps)
    assert not nothing.raw
    assert not same(weights(whole), recorder.raw[-1])
    assert same(weights(resumed), weights(whole))


@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # as above
def test_run_may_start_from_a_checkpoint_without_an_average(tmp_path: Path) -> None:
    checkpoints = ModelCheckpoint(tmp_path / "plain", filename="{epoch}")
    _, before, _ = fit(tmp_path, checkpoints, max_epochs=1)
    again = ModelCheckpoint(tmp_path / "averaged", filename="{epoch}")
    task, after, _ = fit(tmp_path, ModuleEMA(decay=0.9), again, ckpt_path=tmp_path / "plain" / "epoch=0.ckpt")
    _, without, _ = fit(tmp_path)
    assert same(before.raw[-1], without.raw[BATCHES - 1])
    assert all(same(ours, theirs) for ours, theirs in zip(after.raw, without.raw[BATCHES:], strict=True))
    assert_close(weights(task), averages(after.raw, 0.9, warmup=True)[-1])


def test_exception_during_validation_puts_the_raw_weights_back(tmp_path: Path) -> None:
    task, recorder = Task(explode_at=BATCHES), Recorder()
    rescue = ModelCheckpoint(tmp_path / "kept", filename="rescued", every_n_epochs=9, save_on_exception=True)
    run = trainer(tmp_path, recorder, ModuleEMA(decay=0.9), rescue)
    with pytest.raises(ArithmeticError, match="on purpose"):
        run.fit(task, batches(), batches(1))
    expected = averages(recorder.raw, 0.9, warmup=True)[-1]
    assert_close(task.seen_by_validation[-1][1], expected)
    assert same(weights(task), recorder.raw[-1])
    rescued = torch.load(tmp_path / "kept" / "rescued.ckpt", weights_only=True)
    assert_close(of_network(rescued["state_dict"], task), expected)
    assert same(of_network(rescued["current_model_state"], task), recorder.raw[-1])


def test_checkpoint_saved_during_validation_has_average_and_raw_weights(tmp_path: Path) -> None:
    """As SLURM's signal may have it."""

    class Saves(Callback):
        def on_validation_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / "within.ckpt")

    task, recorder = Task(), Recorder()
    trainer(tmp_path, recorder, ModuleEMA(decay=0.9), Saves()).fit(task, batches(), batches(1))
    within = torch.load(tmp_path / "within.ckpt", weights_only=True)
    assert same(of_network(within["state_dict"], task), task.seen_by_validation[-1][1])
    assert same(of_network(within["current_model_state"], task), recorder.raw[-1])


def test_exception_during_training_leaves_the_raw_weights(tmp_path: Path) -> None:
    class Breaks(Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == 6:
                raise ArithmeticError("on purpose")

    task, recorder = Task(), Recorder()
    with pytest.raises(ArithmeticError):
        trainer(tmp_path, recorder, ModuleEMA(decay=0.9), Breaks()).fit(task, batches(), batches(1))
    assert len(recorder.raw) == 6
    assert same(weights(task), recorder.raw[-1])


def test_checkpoint_saved_after_fit_has_average_and_raw_weights(tmp_path: Path) -> None:
    task, recorder, run = fit(tmp_path, ModuleEMA(decay=0.9))
    run.save_checkpoint(tmp_path / "after.ckpt")
    checkpoint = torch.load(tmp_path / "after.ckpt", weights_only=True)
    assert same(of_network(checkpoint["state_dict"], task), weights(task))
    assert same(of_network(checkpoint["current_model_state"], task), recorder.raw[-1])


def test_validation_after_fit_leaves_the_average_in_place(tmp_path: Path) -> None:
    task, _, run = fit(tmp_path, ModuleEMA(decay=0.9))
    average = weights(task)
    run.validate(task, batches(1), verbose=False)
    assert same(task.seen_by_validation[-1][1], average)
    assert same(weights(task), average)


def test_last_checkpoint_of_a_short_run_resumes_with_the_raw_weights(tmp_path: Path) -> None:
    """A run shorter than its saving interval saves when training ends, after the average was put in."""
    checkpoints = ModelCheckpoint(tmp_path / "short", save_last=True, every_n_train_steps=500)
    task, recorder, _ = fit(tmp_path, ModuleEMA(decay=0.9), checkpoints)
    checkpoint = torch.load(tmp_path / "short" / "last.ckpt", weights_only=True)
    assert_close(of_network(checkpoint["state_dict"], task), averages(recorder.raw, 0.9, warmup=True)[-1])
    assert same(of_network(checkpoint["current_model_state"], task), recorder.raw[-1])


def test_only_the_named_submodule_is_averaged(tmp_path: Path) -> None:
    class Two(Task):
        def __init__(self) -> None:
            super().__init__()
            self.student = nn.Linear(3, 2)

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) + self.student(batch).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=0.05)

    ema = ModuleEMA(decay=0.9, module="student")
    task, recorder, _ = fit(tmp_path, ema, task=Two())
    assert same(weights(task), recorder.raw[-1])
    assert ema._average_model is not None
    assert {name for name, _ in ema._average_model.module.named_parameters()} == {"weight", "bias"}
