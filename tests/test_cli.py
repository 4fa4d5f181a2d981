from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
import torchvision
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lit_shortcut.acceleration.shortcut import Shortcut
from lit_shortcut.bases.toy import ToyBase
from lit_shortcut.cli import main
from lit_shortcut.networks.shortcut import ShortcutNet
from lit_shortcut.trajectory import TrajectoryError
from lit_shortcut.weights import WeightsError, save_module
from tests.command_line import TOY, lightning, record_toy

FIT = ("fit", "--config", TOY / "fit.yaml")
TEST = ("test", "--config", TOY / "evaluate.yaml")
PREDICT = ("predict", "--config", TOY / "extract.yaml")
NO_LOGGER = "--trainer.logger=false"
SHORTCUT = "runs/toy/shortcut/shortcut.safetensors"


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return record_toy(tmp_path_factory.mktemp("recorded"))


@pytest.fixture
def folder(recorded: Path, tmp_path: Path) -> Path:
    """A working directory with the toy base's trajectories."""
    shutil.copytree(recorded, tmp_path / "runs/toy/trajectories")
    return tmp_path


def edited(folder: Path, path: Path, old: str, new: str) -> Path:
    """A copy of the YAML ``path`` that says ``new`` in place of ``old``."""
    text = path.read_text()
    assert old in text
    copy = folder / path.name
    copy.write_text(text.replace(old, new).replace("../parts", str(TOY.parent / "parts")))
    return copy


def test_both_names_of_the_command_are_main() -> None:
    for name in ("lightning", "lit-shortcut"):
        (entry,) = entry_points(group="console_scripts", name=name)
        assert entry.load() is main


def test_installed_command_lists_the_four_verbs_and_ends_with_success(tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("lit-shortcut")
    done = subprocess.run([script, "--help"], check=False, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for verb in ("fit", "validate", "test", "predict"):
        assert f"\n    {verb} " in done.stdout


def test_main_returns_nothing_so_that_the_command_ends_with_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["lightning", *map(str, PREDICT)])
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    assert main() is None  # type: ignore[func-returns-value]
    assert (tmp_path / "runs/toy/trajectories/card.json").exists()


# ---- resuming


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists")  # it is gone on with
@pytest.mark.parametrize(
    "data",
    [
        ("--data.batch_size=8", "--data.window=1"),
        ("--data.batch_size=8", "--data.window=3"),
        ("--data.batch_size=16", "--data.window=1"),
        ("--data.batch_size=16", "--data.window=3"),
        ("--config", TOY / "fit_online.yaml"),
        ("--config", TOY / "fit_online.yaml", "--data.batch_size=10", "--data.on_policy_budget=2"),  # 4 batches a pool
    ],
    ids=["within an epoch", "windows", "into the next epoch", "windows, next epoch", "online", "on policy"],
)
def test_resumed_fit_ends_with_the_weights_of_the_uninterrupted_one(
    folder: Path, recorded: Path, tmp_path_factory: pytest.TempPathFactory, data: tuple[object, ...]
) -> None:
    options = (*data, NO_LOGGER)
    lightning(folder, *FIT, *options)
    halves = tmp_path_factory.mktemp("halves")
    shutil.copytree(recorded, halves / "runs/toy/trajectories")
    lightning(halves, *FIT, *options, "--trainer.max_steps=4")
    first = torch.load(halves / "runs/toy/shortcut/last.ckpt", weights_only=True)
    assert first["global_step"] == 4
    lightning(halves, *FIT, *options, "--ckpt_path=runs/toy/shortcut/last.ckpt")
    whole, resumed = (torch.load(path / "runs/toy/shortcut/last.ckpt", weights_only=True) for path in (folder, halves))
    assert whole["global_step"] == resumed["global_step"] == 8
    for key in ("state_dict", "current_model_state", "averaging_state"):
        assert whole[key].keys() == resumed[key].keys()
        assert all(torch.equal(tensor, resumed[key][name]) for name, tensor in whole[key].items())
    moved = [not torch.equal(tensor, first["state_dict"][name]) for name, tensor in whole["state_dict"].items()]
    assert any(moved)
    assert whole["lr_schedulers"] == resumed["lr_schedulers"]
    assert Shortcut.load(folder / SHORTCUT).identity() == Shortcut.load(halves / SHORTCUT).identity()


# ---- other loggers


def test_csv_logger_instead_of_wandb_gets_metrics_grid_and_configuration(folder: Path) -> None:
    lightning(folder, *FIT, "--trainer.logger=lightning.pytorch.loggers.CSVLogger", "--trainer.logger.save_dir=logs")
    (log,) = (folder / "logs").glob("*/version_0")
    header = (log / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"train/loss", "val/gain", "sampling/shortcut_n6_b2/latency_ms"} <= set(header)
    for step in (4, 8):
        grid = torchvision.io.read_image(str(log / f"sampling_grid_step{step}.png"))
        assert grid.float().std() > 1
    assert yaml.safe_load((log / "hparams.yaml").read_text())["config"]["trainer"]["max_steps"] == 8
    assert not (folder / "runs/wandb").exists()


def test_disabled_wandb_leaves_nothing_and_stops_nothing(folder: Path) -> None:
    lightning(folder, *FIT, wandb_mode="disabled")
    lightning(folder, *TEST, wandb_mode="disabled")
    assert not list((folder / "runs/wandb").glob("*run-*"))


def test_tensorboard_instead_of_wandb_gets_metrics_grid_and_table(folder: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: PLC0415 - takes long

    logger = ("--trainer.logger=lightning.pytorch.loggers.TensorBoardLogger", "--trainer.logger.save_dir=logs")
    lightning(folder, *FIT, *logger)
    lightning(folder, *TEST, *logger)
    fitted, tested = (
        EventAccumulator(str(folder / f"logs/lightning_logs/version_{version}")).Reload() for version in (0, 1)
    )
    assert len(fitted.Images("sampling/grid")) == 2
    assert [event.step for event in fitted.Scalars("train/loss")] == list(range(8))
    assert fitted.Scalars("val/gain")
    assert {"report/grids", "report/pareto"} <= set(tested.Tags()["images"])
    assert any("report/table" in name for name in tested.Tags()["tensors"])
    assert not (folder / "runs/wandb").exists()


def test_csv_logger_gets_the_report_as_files(folder: Path) -> None:
    save_module(folder / SHORTCUT, ShortcutNet(width=16, num_heads=2))
    lightning(folder, *TEST, "--trainer.logger=lightning.pytorch.loggers.CSVLogger", "--trainer.logger.save_dir=logs")
    (log,) = (folder / "logs").glob("*/version_0")
    assert len((log / "report_table.csv").read_text().splitlines()) == 1 + 4
    assert {path.name for path in log.glob("*.png")} == {"report_grids_step0.png", "report_pareto_step0.png"}


# ---- bad input


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("num_images: 12", "num_pictures: 12", "num_pictures"),
        ("num_images: 12", "num_images: twelve", "num_images"),
        ("datamodules.conditions.ClassLabels", "datamodules.conditions.Labels", "datamodules.conditions.Labels"),
        ("enable_progress_bar", "enable_progres_bar", "enable_progres_bar"),
    ],
)
def test_wrong_key_or_class_in_yaml_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, message: str
) -> None:
    config = edited(tmp_path, TOY / "extract.yaml", old, new)
    with pytest.raises(SystemExit) as stopped:
        lightning(tmp_path, "predict", "--config", config)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_unknown_precision_is_answered_with_the_choices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        lightning(tmp_path, *PREDICT, "--trainer.precision=12")
    shown = capsys.readouterr().err
    assert "precision" in shown
    assert "bf16-mixed" in shown


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_missing_device_is_named(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"(?i)cuda.*not available|no supported gpu"):
        lightning(tmp_path, *PREDICT, "--trainer.accelerator=cuda")


def test_missing_configuration_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        lightning(tmp_path, "fit", "--config", "nowhere.yaml")
    assert "nowhere.yaml" in capsys.readouterr().err


@pytest.mark.parametrize("exists", [False, True], ids=["missing", "empty"])
def test_fit_without_trajectories_names_the_folder(tmp_path: Path, exists: bool) -> None:
    if exists:
        (tmp_path / "runs/toy/trajectories").mkdir(parents=True)
    with pytest.raises(TrajectoryError, match=r"runs/toy/trajectories/card\.json: expected the card"):
        lightning(tmp_path, *FIT, NO_LOGGER)


def test_fit_on_a_truncated_set_names_the_shard(folder: Path) -> None:
    shard = folder / "runs/toy/trajectories/shard-000001.tar"
    shard.write_bytes(shard.read_bytes()[:-5000])
    with pytest.raises(TrajectoryError, match=r"shard-000001\.tar"):
        lightning(folder, *FIT, NO_LOGGER)


def test_fit_on_another_format_version_names_both(folder: Path) -> None:
    card = folder / "runs/toy/trajectories/card.json"
    card.write_text(json.dumps(json.loads(card.read_text()) | {"format_version": 99}))
    with pytest.raises(TrajectoryError, match="format_version: expected 3, found 99"):
        lightning(folder, *FIT, NO_LOGGER)


def test_fit_with_another_width_names_both(folder: Path) -> None:
    with pytest.raises(WeightsError, match=r"width: expected 16.* 24"):
        lightning(folder, *FIT, NO_LOGGER, "--model.network.width=24")


def test_sampling_in_fit_with_another_base_names_both(folder: Path) -> None:
    other, own = ToyBase(seed=1).fingerprint, ToyBase().fingerprint
    assert other != own
    config = edited(
        folder,
        TOY / "fit.yaml",
        "base: {class_path: lit_shortcut.bases.toy.ToyBase}",
        "base: {class_path: lit_shortcut.bases.toy.ToyBase, init_args: {seed: 1}}",
    )
    with pytest.raises(ValueError, match=f"come from base {own}, .* base {other}"):
        lightning(folder, "fit", "--config", config, NO_LOGGER)


def test_shortcut_of_another_base_is_refused_before_any_row_is_run(folder: Path) -> None:
    facts = {"base_fingerprint": "0123456789abcdef"}
    save_module(folder / SHORTCUT, ShortcutNet(width=16, num_heads=2), facts)
    with pytest.raises(WeightsError, match=f"base 0123456789abcdef, .* {ToyBase().fingerprint}"):
        lightning(folder, *TEST, NO_LOGGER)
    assert not (folder / "runs/toy/report").exists()


def test_missing_shortcut_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"runs/toy/shortcut/shortcut\.safetensors: no such weight file"):
        lightning(tmp_path, *TEST, NO_LOGGER)


def test_checkpoint_that_is_none_is_named(folder: Path) -> None:
    (folder / "other.ckpt").write_bytes(b"no checkpoint")
    config = edited(folder, TOY / "evaluate.yaml", SHORTCUT, "other.ckpt")
    with pytest.raises(WeightsError, match=r"other\.ckpt: not a checkpoint"):
        lightning(folder, "test", "--config", config, NO_LOGGER)


@pytest.fixture(scope="module")
def fitted(recorded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of fit."""
    folder = tmp_path_factory.mktemp("fitted")
    shutil.copytree(recorded, folder / "runs/toy/trajectories")
    lightning(folder, *FIT, NO_LOGGER, "--trainer.max_steps=4")
    return folder / "runs/toy/shortcut/last.ckpt"


@pytest.mark.parametrize("verb", ["fit", "validate"])
@pytest.mark.parametrize(
    ("key", "value", "option", "message"),
    [
        ("base_fingerprint", "0123", (), f"base_fingerprint is 0123, expected {ToyBase().fingerprint}"),
        ("class", "FashionCNN", (), "class is FashionCNN, expected ShortcutNet"),
        (
            None,
            None,
            ("--model.network.num_blocks=2",),
            r"num_blocks is 1, expected 2; network\.blocks\.1\..* is missing",
        ),
    ],
    ids=["another base", "another class", "other sizes"],
)
def test_checkpoint_that_does_not_fit_is_refused_by_name(
    folder: Path, fitted: Path, verb: str, key: str | None, value: str | None, option: tuple[str, ...], message: str
) -> None:
    checkpoint = torch.load(fitted, weights_only=True)
    if key is not None:
        checkpoint["network"][key] = value
    torch.save(checkpoint, folder / "other.ckpt")
    with pytest.raises(WeightsError, match=rf"other\.ckpt: not a checkpoint of this configuration: {message}"):
        lightning(folder, verb, "--config", TOY / "fit.yaml", NO_LOGGER, "--ckpt_path=other.ckpt", *option)


def test_checkpoint_without_some_of_the_weights_is_refused(folder: Path, fitted: Path) -> None:
    checkpoint = torch.load(fitted, weights_only=True)
    del checkpoint["state_dict"]["network.widen.bias"]
    torch.save(checkpoint, folder / "half.ckpt")
    with pytest.raises(WeightsError, match=r"half\.ckpt: .*: network\.widen\.bias is missing"):
        lightning(folder, "validate", "--config", TOY / "fit.yaml", NO_LOGGER, "--ckpt_path=half.ckpt")


@pytest.mark.parametrize("content", [b"no checkpoint", b""])
def test_damaged_checkpoint_to_go_on_from_is_named(folder: Path, content: bytes) -> None:
    (folder / "damaged.ckpt").write_bytes(content)
    with pytest.raises(WeightsError, match=r"damaged\.ckpt: not a checkpoint"):
        lightning(folder, *FIT, NO_LOGGER, "--ckpt_path=damaged.ckpt")


def test_checkpoint_of_another_project_is_refused(folder: Path) -> None:
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6.6", "epoch": 0}, folder / "foreign.ckpt")
    with pytest.raises(WeightsError, match=r"foreign\.ckpt: .* no key 'network'"):
        lightning(folder, "validate", "--config", TOY / "fit.yaml", NO_LOGGER, "--ckpt_path=foreign.ckpt")


def test_class_out_of_range_is_refused_by_every_verb(folder: Path) -> None:
    message = r"class labels must lie in 0\.\.9; got"
    save_module(folder / SHORTCUT, ShortcutNet(width=16, num_heads=2))
    with pytest.raises(ValueError, match=message):
        lightning(folder, *PREDICT, "--data.num_classes=11", "--trainer.callbacks.folder=runs/other")
    with pytest.raises(ValueError, match=message):
        lightning(folder, *TEST, NO_LOGGER, "--data.num_classes=11", "--data.num_images=11")
    assert not (folder / "runs/toy/report").exists()
    config = edited(folder, TOY / "fit.yaml", "num_images: 6", "num_images: 11, num_classes: 11")
    with pytest.raises(ValueError, match=message):
        lightning(folder, "fit", "--config", config, NO_LOGGER)
    assert not (folder / "runs/toy/shortcut/last.ckpt").exists()


def test_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OSError, match=r"file/set.*cannot be written"):
        lightning(tmp_path, *PREDICT, "--trainer.callbacks.folder=file/set")


def test_results_and_exports_that_cannot_be_written_are_refused_before_anything_is_run(folder: Path) -> None:
    (folder / "file").write_text("no folder")
    save_module(folder / SHORTCUT, ShortcutNet(width=16, num_heads=2))
    with pytest.raises(OSError, match=r"file/report: cannot be written"):
        lightning(folder, *TEST, NO_LOGGER, "--model.results=file/report")
    config = edited(
        folder, TOY / "fit.yaml", "path: runs/toy/shortcut/shortcut.safetensors", "path: file/net.safetensors"
    )
    with pytest.raises(OSError, match=r"file: cannot be written"):
        lightning(folder, "fit", "--config", config, NO_LOGGER)
    assert not (folder / "runs/toy/shortcut/last.ckpt").exists()


def test_exported_file_loads_as_checkpoint_does(folder: Path) -> None:
    lightning(folder, *FIT, NO_LOGGER, "--trainer.max_steps=4")
    exported, saved = (
        Shortcut.load(folder / "runs/toy/shortcut" / name) for name in ("shortcut.safetensors", "last.ckpt")
    )
    assert exported.identity() == saved.identity()


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists")  # the export lies there too
def test_trial_run_leaves_exported_weights_alone(folder: Path) -> None:
    (folder / SHORTCUT).parent.mkdir(parents=True)
    (folder / SHORTCUT).write_bytes(b"precious")
    lightning(folder, *FIT, "--trainer.fast_dev_run=true")
    assert (folder / SHORTCUT).read_bytes() == b"precious"


def test_command_advertises_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    lightning(tmp_path, "predict", "--config", TOY / "extract.yaml")
    assert "12 of 12 trajectories" in caplog.text
    assert "Tip" not in caplog.text
