"""Runs that leave out batches try a command out: they say so, and write nothing that lasts."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest

from lit_shortcut.callbacks.fit_linear import FitLinear
from tests.command_line import CONFIGS, TOY, lightning, record_toy
from tests.idx import write_test_split

FIT = ("--config", TOY / "fit.yaml", "--trainer.logger=false")
CALIBRATE = (*FIT, "--config", TOY / "calibrate.yaml")
REFERENCE = ("--config", CONFIGS / "fashion/reference.yaml", "--trainer.accelerator=cpu", "--data.folder=images")
PICTURES = (
    "--config",
    CONFIGS / "fashion/generate.yaml",
    "--trainer.accelerator=cpu",
    "--labels",
    "0,7",
    "--batch_size=1",
)
SMALL = ("--data.num_images=2", "--data.batch_size=2", "--model.rounds=1")
BENCH = ("--config", CONFIGS / "fashion/bench.yaml", "--trainer.accelerator=cpu", *SMALL)
DEV, FEW = "--trainer.fast_dev_run=true", "--trainer.limit_{}_batches=1"


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return record_toy(tmp_path_factory.mktemp("recorded"))


def files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file() and ".cache" not in path.parts}


@pytest.mark.parametrize(
    ("verb", "words", "place"),
    [
        ("predict", ("--config", TOY / "extract.yaml", DEV, "--trainer.callbacks.folder=other"), "other"),
        ("predict", (*REFERENCE, DEV), "checkpoints/fashion/reference.safetensors"),
        ("predict", (*REFERENCE, FEW.format("predict")), "checkpoints/fashion/reference.safetensors"),
        ("generate", (*PICTURES, FEW.format("predict")), "runs/fashion/pictures"),
        ("validate", (*CALIBRATE, DEV), "runs/toy/shortcut/plan.json"),
        ("validate", (*CALIBRATE, FEW.format("val")), "runs/toy/shortcut/plan.json"),
        ("fit", (*FIT, DEV), "runs/toy/shortcut/shortcut.safetensors"),
        ("test", (*BENCH, DEV), "runs/fashion/bench.json"),
    ],
    ids=[
        "record",
        "reference",
        "reference of a batch",
        "generate",
        "calibrate",
        "calibrate on a batch",
        "fit",
        "bench",
    ],
)
def test_trial_run_writes_nothing_and_says_so(
    verb: str, words: tuple[object, ...], place: str, recorded: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(recorded, tmp_path / "runs/toy/trajectories")
    write_test_split(tmp_path / "images", count=20)
    before = files(tmp_path)
    with caplog.at_level(logging.INFO):
        lightning(tmp_path, verb, *words)
    assert files(tmp_path) == before
    assert f"a trial run: nothing is written to {place}" in caplog.text


def test_linear_predictor_is_not_fitted_by_a_trial_run(
    recorded: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(recorded, tmp_path / "runs/toy/trajectories")
    fit_linear = f"{FitLinear.__module__}.FitLinear"
    options = (f"--trainer.callbacks={fit_linear}", "--trainer.callbacks.path=linear.safetensors")
    with caplog.at_level(logging.INFO):
        lightning(tmp_path, "validate", *FIT, *options, FEW.format("val"))
    assert not (tmp_path / "linear.safetensors").exists()
    assert "nothing is written to linear.safetensors" in caplog.text
    lightning(tmp_path, "validate", *FIT, *options)
    assert (tmp_path / "linear.safetensors").exists()
