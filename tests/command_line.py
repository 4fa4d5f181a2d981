"""The ``lightning`` command inside the test's own process."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
import torch
import wandb

from lit_shortcut.cli import main

CONFIGS = Path(__file__).parents[1] / "configs"
TOY = CONFIGS / "toy"


def lightning(folder: Path, *words: object, wandb_mode: str = "offline") -> None:
    """Run ``lightning <words>`` in ``folder``, W&B in ``wandb_mode``; what it sets for its process is put back."""
    precision = torch.get_float32_matmul_precision()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("sys.argv", ["lightning"])
        for name, value in {"WANDB_MODE": wandb_mode, "WANDB_SILENT": "true", "PL_GLOBAL_SEED": "0"}.items():
            patch.setenv(name, value)
        try:
            main([str(word) for word in words])
        finally:
            wandb.finish()
            wandb.teardown()  # its service resolves relative folders where it started, and may still be writing
            torch.set_float32_matmul_precision(precision)


def record_toy(folder: Path) -> Path:
    """Trajectories of the toy base, recorded below ``folder``."""
    lightning(folder, "predict", "--config", TOY / "extract.yaml")
    return folder / "runs" / "toy" / "trajectories"


def run_verbs(folder: Path, name: str) -> Path:
    """Record, train, validate and test in ``folder`` as ``configs/<name>`` says; returns ``folder``."""
    (folder / "configs").symlink_to(CONFIGS)
    lightning(folder, "predict", "--config", CONFIGS / name / "extract.yaml")
    lightning(folder, "fit", "--config", CONFIGS / name / "fit.yaml")
    checkpoint = f"runs/{name}/shortcut/last.ckpt"
    lightning(folder, "validate", "--config", CONFIGS / name / "fit.yaml", "--ckpt_path", checkpoint)
    lightning(folder, "test", "--config", CONFIGS / name / "evaluate.yaml")
    return folder


def fresh_process(target: Callable[..., object], *arguments: object) -> ForkServerProcess:
    """A process that has imported the command line and trained nothing: autograd's threads do not survive a fork."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.command_line"])
    return context.Process(target=target, args=arguments)
