from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.demos.boring_classes import BoringModel

from lit_shortcut.callbacks.progress import PlainProgress, TerminalProgress, progress_bar
from tests.command_line import TOY, lightning


class Ticks:
    """A clock that advances by one second whenever it is read."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """``said()``: lines of progress so far."""
    caplog.set_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero")
    forms = r"(fit|validate|test|predict): \d+"
    return lambda: [record.message for record in caplog.records if re.match(forms, record.message)]


def run(verb: str, every_seconds: float, **arguments: Any) -> None:
    quiet: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_model_summary": False}
    quiet |= {"enable_checkpointing": False, "callbacks": [PlainProgress(every_seconds, Ticks())]}
    getattr(L.Trainer(**quiet, **arguments), verb)(BoringModel())


@pytest.mark.parametrize("verb", ["test", "predict", "validate"])
def test_lines_say_how_far_a_run_is(verb: str, said: Callable[[], list[str]]) -> None:
    run(verb, 3, **{f"limit_{'val' if verb == 'validate' else verb}_batches": 8})
    assert said() == [
        f"{verb}: 8 batches",
        f"{verb}: 3 of 8 batches, 0:03 passed, 0:05 left",
        f"{verb}: 6 of 8 batches, 0:06 passed, 0:02 left",
        f"{verb}: 8 of 8 batches, 0:08 passed",
    ]


def test_steps_are_counted_over_epochs_and_validation_has_lines_of_its_own(said: Callable[[], list[str]]) -> None:
    run("fit", 1000, max_steps=6, max_epochs=-1, limit_train_batches=3, limit_val_batches=2)
    first, *rest = said()
    assert first == "fit: 6 steps"
    assert [line.split(",")[0] for line in rest] == [
        "validate: 2 batches",
        "validate: 2 of 2 batches",
        "fit: 6 of 6 steps",
        "validate: 2 batches",
        "validate: 2 of 2 batches",
    ]


def test_time_left_after_a_resume_counts_only_what_this_run_did(tmp_path: Path, said: Callable[[], list[str]]) -> None:
    quiet: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_model_summary": False}
    quiet |= {"enable_checkpointing": False, "max_epochs": -1, "limit_train_batches": 20, "limit_val_batches": 0}
    first = L.Trainer(**quiet, max_steps=20, callbacks=[PlainProgress(1000, Ticks())])
    first.fit(BoringModel())
    first.save_checkpoint(tmp_path / "last.ckpt")
    again = L.Trainer(**quiet, max_steps=40, callbacks=[PlainProgress(10, Ticks())])
    again.fit(BoringModel(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert said()[3] == "fit: 30 of 40 steps, 0:10 passed, 0:10 left"


def test_bar_is_for_terminals_and_lines_are_for_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    for is_terminal, kind in ((True, TerminalProgress), (False, PlainProgress)):
        monkeypatch.setattr("sys.stdout.isatty", lambda answer=is_terminal: answer)
        assert type(progress_bar()) is kind


@pytest.mark.parametrize(("max_epochs", "epoch"), [(-1, "Epoch 7"), (9, "Epoch 7/8")])
def test_bar_names_the_last_epoch_where_there_is_one(max_epochs: int, epoch: str) -> None:
    bar = TerminalProgress()
    bar.setup(L.Trainer(accelerator="cpu", logger=False, max_epochs=max_epochs, max_steps=5), BoringModel(), "fit")
    assert bar._get_train_description(7).strip() == epoch


def test_command_leaves_a_bar_that_the_configuration_names(tmp_path: Path, said: Callable[[], list[str]]) -> None:
    words = ["predict", "--config", TOY / "extract.yaml", "--trainer.enable_progress_bar=true"]
    lightning(tmp_path, *words)
    assert said()
    count = len(said())
    bar = f"{RichProgressBar.__module__}.RichProgressBar"
    lightning(tmp_path, *words, f"--trainer.callbacks+={bar}", "--trainer.callbacks.refresh_rate=2")
    assert len(said()) == count
