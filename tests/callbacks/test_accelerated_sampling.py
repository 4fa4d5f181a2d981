from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
import torchvision
import yaml
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from datamodules.conditions import ClassLabels
from datamodules.trajectories import TrajectoryDataModule
from lit_shortcut.acceleration.predictors import Hold
from lit_shortcut.acceleration.shortcut import Shortcut
from lit_shortcut.bases.toy import ToyBase
from lit_shortcut.callbacks.accelerated_sampling import AcceleratedSampling
from lit_shortcut.callbacks.ema import ModuleEMA
from lit_shortcut.evaluation.drawing import Drawn, draw_row
from lit_shortcut.evaluation.rows import Row, build_rows
from lit_shortcut.metrics.latency import device_name
from lit_shortcut.networks.shortcut import ShortcutNet
from lit_shortcut.sampling import Decoding
from lit_shortcut.tasks.shortcut import ShortcutTask
from tests.command_line import record_toy
from tests.metrics.brightness import Brightness
from tests.metrics.difference import Difference

DECODING = Decoding(num_steps=6)


class Watch(L.Callback):
    """What was logged at the end of each validation, and whether the network was in training mode after it."""

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []
        self.training: list[bool] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        assert isinstance(pl_module, ShortcutTask)
        self.training.append(pl_module.network.training)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return record_toy(tmp_path_factory.mktemp("recorded"))


def make(**arguments: Any) -> AcceleratedSampling:
    defaults: dict[str, Any] = {
        "base": ToyBase(),
        "decoding": DECODING,
        "rows": [[6, 2, "shortcut"], [4, 2, "shortcut"]],
        "conditions": ClassLabels(6, batch_size=4, seed=3),
        "metrics": {"brightness": Brightness()},
        "latency_rounds": 1,
        "grid_images": 3,
    }
    return AcceleratedSampling(**(defaults | arguments))


def fit(
    recorded: Path, sampling: AcceleratedSampling, *callbacks: L.Callback, **arguments: Any
) -> tuple[ShortcutTask, Watch]:
    defaults: dict[str, Any] = {"max_steps": 4, "val_check_interval": 2, "num_sanity_val_steps": 0, "logger": False}
    watch = Watch()
    trainer = L.Trainer(
        accelerator="cpu",
        check_val_every_n_epoch=None,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[*callbacks, sampling, watch],
        **(defaults | arguments),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = ShortcutNet(width=16, num_heads=2)
    task = ShortcutTask(network, optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.1))
    trainer.fit(task, datamodule=TrajectoryDataModule(str(recorded), batch_size=8))
    return task, watch


def brightness(*entry: Any, network: ShortcutNet | None = None) -> float:
    (conditions,) = ClassLabels(6, batch_size=6, seed=3).loader()
    (row,) = build_rows([entry], DECODING, {"shortcut": Shortcut(network)} if network else {})
    return float(draw_row(ToyBase(), conditions, row).images.float().mean())


@pytest.mark.parametrize("callbacks", [(), (ModuleEMA(decay=0.9),)], ids=["raw", "averaged"])
def test_metrics_are_those_of_images_drawn_with_the_network_that_fit_leaves(
    recorded: Path, callbacks: tuple[L.Callback, ...]
) -> None:
    task, watch = fit(recorded, make(), *callbacks)
    network, last = task.network, watch.logged[-1]
    assert isinstance(network, ShortcutNet)
    assert last["sampling/vanilla_n6/brightness"] == pytest.approx(brightness(6), rel=1e-5)
    for num_steps in (6, 4):
        expected = brightness(num_steps, 2, "shortcut", network=network)
        assert last[f"sampling/shortcut_n{num_steps}_b2/brightness"] == pytest.approx(expected, rel=1e-5)
        assert last[f"sampling/shortcut_n{num_steps}_b2/full_steps"] == 2
    untrained = brightness(6, 2, "shortcut", network=ShortcutNet(width=16, num_heads=2))
    assert last["sampling/shortcut_n6_b2/brightness"] != pytest.approx(untrained, rel=1e-5)


def test_latency_and_speed_up_refer_to_vanilla_of_the_same_validation(recorded: Path) -> None:
    _, watch = fit(recorded, make())
    for logged in watch.logged:
        vanilla = logged["sampling/vanilla_n6/latency_ms"]
        assert logged["sampling/vanilla_n6/speedup"] == 1
        for name in ("shortcut_n6_b2", "shortcut_n4_b2"):
            speedup = vanilla / logged[f"sampling/{name}/latency_ms"]
            assert logged[f"sampling/{name}/speedup"] == pytest.approx(speedup, rel=1e-4)
    assert watch.logged[0]["sampling/vanilla_n6/latency_ms"] != watch.logged[1]["sampling/vanilla_n6/latency_ms"]


def test_batch_and_device_of_the_timing_go_to_the_loggers(recorded: Path, tmp_path: Path) -> None:
    fit(recorded, make(conditions=ClassLabels(6, batch_size=4, seed=3)), logger=CSVLogger(tmp_path))
    (path,) = tmp_path.glob("**/hparams.yaml")
    told = yaml.safe_load(path.read_text())
    assert told["sampling/latency_batch_size"] == 4
    assert told["sampling/latency_device"] == device_name(torch.device("cpu"))


def test_sampling_does_not_change_what_training_sees(recorded: Path) -> None:
    sampled, watch = fit(recorded, make())
    plain, _ = fit(recorded, make(every_n_validations=9))
    for name, tensor in sampled.network.state_dict().items():
        assert torch.equal(tensor, plain.network.state_dict()[name])
    assert set(watch.training) == {True}


def test_vanilla_images_are_drawn_once(recorded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []

    def counted(base: ToyBase, conditions: Any, row: Row) -> Drawn:
        drawn.append(row.name)
        return draw_row(base, conditions, row)

    monkeypatch.setattr("lit_shortcut.callbacks.accelerated_sampling.draw_row", counted)
    fit(recorded, make())
    assert drawn == ["vanilla_n6"] * 2 + (["shortcut_n6_b2"] * 2 + ["shortcut_n4_b2"] * 2) * 2


def test_paired_metrics_compare_with_vanilla_at_every_validation(recorded: Path) -> None:
    task, watch = fit(recorded, make(metrics={"difference": Difference()}, latency_rounds=0))
    (conditions,) = ClassLabels(6, batch_size=6, seed=3).loader()
    rows = build_rows([(6,), (4, 2, "shortcut")], DECODING, {"shortcut": Shortcut(task.network)})
    vanilla, own = (draw_row(ToyBase(), conditions, row).images.float() for row in rows)
    assert [logged["sampling/vanilla_n6/difference"] for logged in watch.logged] == [0, 0]
    expected = pytest.approx(float((own - vanilla).abs().mean()), rel=1e-5)
    assert watch.logged[-1]["sampling/shortcut_n4_b2/difference"] == expected != 0


def test_sampling_may_skip_validations_and_the_sanity_check(recorded: Path) -> None:
    _, watch = fit(recorded, make(every_n_validations=2), max_steps=6, num_sanity_val_steps=1)
    sampled = ["sampling/shortcut_n6_b2/speedup" in logged for logged in watch.logged]
    assert sampled[:2] == [False, True]
    assert len(watch.logged) == 4


def test_count_of_validations_goes_on_from_a_checkpoint(recorded: Path) -> None:
    first = make(every_n_validations=2)
    fit(recorded, first, max_steps=2)
    resumed = make(every_n_validations=2)
    resumed.load_state_dict(first.state_dict())
    _, watch = fit(recorded, resumed, max_steps=4)
    assert ["sampling/shortcut_n6_b2/speedup" in logged for logged in watch.logged] == [False, True]


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16-mixed", torch.bfloat16), ("bf16-true", torch.bfloat16), ("32-true", torch.float32)]
)
def test_images_are_drawn_in_the_precision_of_test_and_weights_are_cast_once(
    recorded: Path, monkeypatch: pytest.MonkeyPatch, precision: Any, dtype: torch.dtype
) -> None:
    seen: set[Any] = set()

    def noted(base: ToyBase, conditions: Any, row: Row) -> Drawn:
        weights = {parameter.dtype for parameter in base.parameters()}
        seen.add((*weights, torch.is_autocast_enabled("cpu")))
        return draw_row(base, conditions, row)

    monkeypatch.setattr("lit_shortcut.callbacks.accelerated_sampling.draw_row", noted)
    fit(recorded, make(latency_rounds=0), max_steps=2, precision=precision)
    assert seen == {(dtype, False)}


def test_base_in_bfloat16_is_sampled_with_a_copy_of_the_network(recorded: Path) -> None:
    sampling = make(base=ToyBase().bfloat16(), latency_rounds=0)
    task, _ = fit(recorded, sampling, max_steps=2)
    assert {parameter.dtype for parameter in task.network.parameters()} == {torch.float32}
    assert sampling.copy is not None
    for name, tensor in sampling.copy.state_dict().items():
        assert torch.equal(tensor, task.network.state_dict()[name].bfloat16())


def test_latency_and_grid_may_be_left_out(recorded: Path, tmp_path: Path) -> None:
    _, watch = fit(recorded, make(latency_rounds=0, grid_images=0), max_steps=2, logger=CSVLogger(tmp_path))
    assert "sampling/shortcut_n6_b2/brightness" in watch.logged[-1]
    assert "sampling/shortcut_n6_b2/latency_ms" not in watch.logged[-1]
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize(
    "wrong",
    [{"every_n_validations": 0}, {"latency_rounds": -1}, {"grid_images": -1}, {"methods": {"shortcut": Hold()}}],
    ids=str,
)
def test_what_makes_no_sense_is_refused_at_construction(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        make(**wrong)


def test_grid_that_fails_does_not_end_training(recorded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise ValueError("no such glyph")

    monkeypatch.setattr("lit_shortcut.callbacks.accelerated_sampling.grids", fail)
    task, watch = fit(recorded, make(latency_rounds=0), max_steps=2)
    assert "sampling/shortcut_n6_b2/brightness" in watch.logged[-1]
    assert task.global_step == 2


def test_grid_shows_vanilla_and_every_plan(recorded: Path, tmp_path: Path) -> None:
    fit(recorded, make(), logger=CSVLogger(tmp_path))
    (path,) = tmp_path.glob("**/sampling_grid_step4.png")
    picture = torchvision.io.read_image(str(path))
    assert picture.float().std() > 1


def test_rows_unlike_the_recorded_trajectories_are_named_in_the_log(
    recorded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("lit_shortcut.evaluation.identity.rank_zero_info", said.append)
    fit(recorded, make(latency_rounds=0), max_steps=2)
    assert said == ["shortcut_n4_b2: not drawn as its shortcut's trajectories were: num_steps was 6 and is 4"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"base": ToyBase(seed=1)}, "come from base .*, but sampling would accelerate base .*: use the same weights"),
        ({"rows": [[6, 2, "shortcut"], [6, 7, "shortcut"]]}, r"budget must lie in 1\.\.6.*got 7"),
        ({"rows": [[6, 2, "hold"]]}, r"'hold'; known are shortcut"),
        ({"rows": [[17, 2, "shortcut"]]}, r"num_steps must lie in 1\.\.16.*got 17"),
        ({"conditions": ClassLabels(11, num_classes=11)}, r"class labels must lie in 0\.\.9"),
    ],
)
def test_what_cannot_be_sampled_is_refused_before_anything_is_trained(
    recorded: Path, arguments: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> Tensor:
        raise AssertionError("a step was trained")

    monkeypatch.setattr(ShortcutTask, "training_step", never)
    with pytest.raises(ValueError, match=message):
        fit(recorded, make(**arguments))


def test_fewer_batches_than_ranks_are_refused_on_every_rank() -> None:
    """Six images in batches of four are two batches."""
    task, ranks = ShortcutTask(ShortcutNet(width=16, num_heads=2)), SimpleNamespace(world_size=3)
    with pytest.raises(ValueError, match=r"conditions.* make 2 batches, and each of 3 ranks needs one: .*batch_size"):
        make().setup(ranks, task, "fit")  # type: ignore[arg-type]
