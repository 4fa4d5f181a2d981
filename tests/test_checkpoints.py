from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from lit_shortcut.checkpoints import WholeCheckpointIO
from lit_shortcut.cli import ShortcutCLI
from tests.command_line import TOY, lightning


class Unwritable:
    def __reduce__(self) -> Any:
        raise OSError("No space left on device")


def test_checkpoint_is_what_was_saved(tmp_path: Path) -> None:
    path = tmp_path / "new" / "last.ckpt"
    WholeCheckpointIO().save_checkpoint({"weights": torch.arange(3)}, path)
    assert torch.equal(torch.load(path, weights_only=True)["weights"], torch.arange(3))
    assert list(path.parent.iterdir()) == [path]


def test_failed_writing_leaves_the_checkpoint_before_it_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    WholeCheckpointIO().save_checkpoint({"step": 1}, path)
    with pytest.raises(OSError, match="No space left"):
        WholeCheckpointIO().save_checkpoint({"weights": torch.ones(1000), "rest": Unwritable()}, path)
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_checkpoint_is_on_the_disk_before_it_takes_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, done = tmp_path / "last.ckpt", []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: done.append("synced") or fsync(file))
    monkeypatch.setattr(os, "replace", lambda old, new: done.append("renamed") or replace(old, new))
    WholeCheckpointIO().save_checkpoint({"step": 1}, path)
    assert done == ["synced", "renamed", "synced"]  # the file, its name, the folder


class Own(TorchCheckpointIO):
    """A user's."""


@pytest.mark.parametrize(
    ("words", "kind"),
    [((), WholeCheckpointIO), (("--trainer.plugins=tests.test_checkpoints.Own",), Own)],
    ids=["by default", "from YAML"],
)
def test_command_line_saves_whole_checkpoints_unless_told_how(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], kind: type
) -> None:
    used: list[type] = []

    def stop(cli: ShortcutCLI, subcommand: str) -> None:
        used.append(type(cli.trainer.strategy.checkpoint_io))

    monkeypatch.setattr(ShortcutCLI, "_run_subcommand", stop)
    lightning(tmp_path, "fit", "--config", TOY / "fit.yaml", "--trainer.logger=false", *words)
    assert used == [kind]
