from __future__ import annotations

import csv
import json
from pathlib import Path

import lightning as L
import pandas as pd
import pytest
import torch
import torchvision
import wandb
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_shortcut.loggers import log_page, log_picture, log_table
from tests.wandb_offline import read_run

PICTURE = torch.arange(3 * 4 * 5, dtype=torch.uint8).view(3, 4, 5)
TABLE = pd.DataFrame({"name": ["vanilla", "hold"], "distance": [7.5, 8.25]})


def trainer(folder: Path, *loggers: Logger) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu", default_root_dir=folder, logger=list(loggers) or False, enable_progress_bar=False
    )


def test_csv_logger_gets_a_png_and_a_csv_in_its_folder(tmp_path: Path) -> None:
    run = trainer(tmp_path, CSVLogger(tmp_path, name="csv"))
    log_picture(run, "report/grids", PICTURE)
    log_table(run, "report/table", TABLE)
    folder = tmp_path / "csv" / "version_0"
    assert torch.equal(torchvision.io.read_image(str(folder / "report_grids_step0.png")), PICTURE)
    with (folder / "report_table.csv").open() as file:
        assert list(csv.reader(file)) == [["name", "distance"], ["vanilla", "7.5"], ["hold", "8.25"]]


def test_tensorboard_gets_picture_and_table(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    run = trainer(tmp_path, logger)
    log_picture(run, "report/grids", PICTURE)
    log_table(run, "report/table", TABLE)
    logger.finalize("success")
    found = EventAccumulator(logger.log_dir).Reload()
    (image,) = found.Images("report/grids")
    assert (image.width, image.height) == (5, 4)
    decoded = torchvision.io.decode_png(torch.frombuffer(bytearray(image.encoded_image_string), dtype=torch.uint8))
    assert torch.equal(decoded, PICTURE)
    (name,) = found.Tags()["tensors"]
    assert b"8.25" in found.Tensors(name)[0].tensor_proto.string_val[0]


def test_wandb_gets_picture_table_and_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = trainer(tmp_path, WandbLogger(project="test", save_dir=tmp_path))
    log_picture(run, "report/grids", PICTURE)
    log_table(run, "report/table", TABLE)
    (tmp_path / "report.html").write_text("<p>a page</p>")
    log_page(run, "report/page", tmp_path / "report.html")
    wandb.finish()
    wandb.teardown()
    (folder,) = tmp_path.glob("wandb/offline-run-*")
    found = read_run(folder)
    (picture,) = (path for path in found.files if path.endswith(".png"))
    assert torch.equal(torchvision.io.read_image(str(folder / "files" / picture)), PICTURE)
    (page,) = (path for path in found.files if path.endswith(".html"))
    assert (folder / "files" / page).read_text() == "<p>a page</p>"
    (table,) = (path for path in found.files if path.endswith(".table.json"))
    content = json.loads((folder / "files" / table).read_text())
    assert content["columns"] == ["name", "distance"]
    assert content["data"] == [["vanilla", 7.5], ["hold", 8.25]]


def test_several_loggers_all_get_it(tmp_path: Path) -> None:
    log_picture(trainer(tmp_path, *(CSVLogger(tmp_path, name=name) for name in "ab")), "grid", PICTURE)
    assert len(list(tmp_path.glob("?/version_0/grid_step0.png"))) == 2


def test_without_loggers_nothing_is_written(tmp_path: Path) -> None:
    log_picture(trainer(tmp_path), "grid", PICTURE)
    log_table(trainer(tmp_path), "table", TABLE)
    assert list(tmp_path.iterdir()) == []


def test_trial_run_leaves_no_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = L.Trainer(accelerator="cpu", logger=CSVLogger(tmp_path), fast_dev_run=True, enable_progress_bar=False)
    log_picture(run, "grid", PICTURE)
    log_table(run, "table", TABLE)
    assert list(tmp_path.iterdir()) == []


def test_logger_that_fails_is_logged_and_the_others_get_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise OSError("no space left")

    broken = TensorBoardLogger(tmp_path / "tensorboard")
    run = trainer(tmp_path, broken, CSVLogger(tmp_path, name="csv"))
    monkeypatch.setattr(broken.experiment, "add_image", fail)
    log_picture(run, "grid", PICTURE)
    assert (tmp_path / "csv" / "version_0" / "grid_step0.png").exists()
    assert "TensorBoardLogger failed" in caplog.text
    assert "no space left" in caplog.text
