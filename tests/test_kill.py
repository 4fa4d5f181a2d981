"""Killed at any moment and started again, training and measuring end as if nothing had happened."""

from __future__ import annotations

import json
import random
import signal
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import lit_shortcut.tasks.evaluation
from lit_shortcut.evaluation.rows import Row
from lit_shortcut.weights import load_tensors
from tests.command_line import TOY, fresh_process, lightning, record_toy

RUN = Path("runs/toy/killed")
LAST = RUN / "last.ckpt"
STEPS = 210
SETTINGS = {
    "trainer": {
        "max_steps": STEPS,
        "limit_val_batches": 1,
        "val_check_interval": 50,
        "logger": False,
        "callbacks": [
            {"class_path": "lit_shortcut.callbacks.ema.ModuleEMA", "init_args": {"decay": 0.99}},
            {
                "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                "init_args": {"dirpath": str(RUN), "filename": "{step}", "monitor": "val/mse"},
            },
            {
                "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                "init_args": {
                    "dirpath": str(RUN),
                    "filename": "last",
                    "every_n_train_steps": 7,  # in the middle of an epoch of 10 batches, and at its end
                    "enable_version_counter": False,
                },
            },
            {
                "class_path": "lit_shortcut.callbacks.export.ExportWeights",
                "init_args": {"path": str(RUN / "shortcut.safetensors"), "licence": "Apache-2.0", "trained_on": "toys"},
            },
        ],
    },
    "model": {
        "init_args": {
            "scheduler": {
                "class_path": "torch.optim.lr_scheduler.OneCycleLR",
                "init_args": {"max_lr": 0.01, "total_steps": STEPS},
            }
        }
    },
}
RECORDED = ("--data.window=3",)
ONLINE = ("--config", TOY / "fit_online.yaml")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    record_toy(folder)
    (folder / "fit.yaml").write_text(yaml.safe_dump(SETTINGS))
    return folder


def fit(folder: Path, *words: object) -> None:
    torch.set_num_threads(1)  # GNU OpenMP does not survive a fork
    lightning(folder, "fit", "--config", TOY / "fit.yaml", *words)


def written(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


def kill_once(is_time: Callable[[], bool], delay_s: float, process: BaseProcess) -> None:
    """Start ``process`` and kill it ``delay_s`` after ``is_time``."""
    process.start()
    while process.is_alive() and not is_time():
        time.sleep(0.001)
    time.sleep(delay_s)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, "it ended before it was killed"


def assert_same(one: Any, other: Any, where: str) -> None:
    """Equal bit for bit, whatever is in them."""
    assert type(one) is type(other), where
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key, value in one.items():
            assert_same(value, other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for index, value in enumerate(one):
            assert_same(value, other[index], f"{where}.{index}")
    else:
        assert one == other, where


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists")  # it is gone on with
@pytest.mark.parametrize(
    ("kills", "data"),
    [
        pytest.param(5, RECORDED, id="recorded"),
        pytest.param(2, ONLINE, id="online"),
        pytest.param(20, RECORDED, id="recorded, often", marks=pytest.mark.slow),
        pytest.param(20, ONLINE, id="online, often", marks=pytest.mark.slow),
    ],
)
def test_killed_training_ends_with_the_bits_of_the_uninterrupted_one(
    folder: Path, tmp_path: Path, kills: int, data: tuple[object, ...]
) -> None:
    steps = STEPS * max(1, kills // 5)
    length = (f"--trainer.max_steps={steps}", f"--model.scheduler.total_steps={steps}")
    for name in ("whole", "killed"):
        (tmp_path / name / "runs/toy").mkdir(parents=True)
        (tmp_path / name / "runs/toy/trajectories").symlink_to(folder / "runs/toy/trajectories")
    words = (*data, "--config", folder / "fit.yaml", *length)
    fit(tmp_path / "whole", *words)
    moment = random.Random(time.time_ns())
    resume: tuple[str, ...] = ()
    for _ in range(kills):
        before = written(tmp_path / "killed" / LAST)
        kill_once(
            lambda before=before: written(tmp_path / "killed" / LAST) != before,
            moment.uniform(0, 0.05),
            fresh_process(fit, tmp_path / "killed", *words, *resume),
        )
        resume = ("--ckpt_path=last",)
    fit(tmp_path / "killed", *words, *resume)
    assert_same(
        *(load_tensors(tmp_path / name / RUN / "shortcut.safetensors") for name in ("whole", "killed")), "exported"
    )
    assert not list((tmp_path / "killed" / LAST).parent.glob(".*.ckpt.*"))  # of half-written checkpoints
    whole, killed = (torch.load(tmp_path / name / LAST, weights_only=True) for name in ("whole", "killed"))
    assert whole["global_step"] == steps
    for part in ("state_dict", "current_model_state", "averaging_state", "optimizer_states", "lr_schedulers"):
        assert_same(whole[part], killed[part], part)


@pytest.mark.parametrize("moment", [3, 10])
def test_killed_test_loses_at_most_one_batch_and_ends_with_the_same_bytes(
    tmp_path: Path, moment: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = lit_shortcut.tasks.evaluation.draw_row

    def noted(base: Any, conditions: Any, row: Row) -> Any:
        with (tmp_path / "drawn").open("a") as file:
            file.write(f"{row.name}\n")
        return draw(base, conditions, row)

    def measure(results: str) -> None:
        torch.set_num_threads(1)
        rows = "--model.rows=" + json.dumps([[3], [4], [5], [6]])
        words = ("--trainer.logger=false", "--model.latency_rounds=0", f"--model.results={results}", rows)
        lightning(tmp_path, "test", "--config", TOY / "evaluate.yaml", *words, "--model.methods=null")

    def drawn() -> list[str]:
        path = tmp_path / "drawn"
        return path.read_text().split() if path.exists() else []

    monkeypatch.setattr(lit_shortcut.tasks.evaluation, "draw_row", noted)
    kill_once(lambda: len(drawn()) >= moment, 0, get_context("fork").Process(target=measure, args=("killed",)))
    assert moment <= len(drawn()) < 24
    measure("killed")
    assert 24 <= len(drawn()) <= 24 + 1  # 4 rows, 2 seeds, 10 images in batches of 4
    measure("whole")
    for path in (tmp_path / "whole").glob("*/*"):
        assert (tmp_path / "killed" / path.relative_to(tmp_path / "whole")).read_bytes() == path.read_bytes()
    assert not list((tmp_path / "killed" / "unfinished").iterdir())
