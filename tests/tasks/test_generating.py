from __future__ import annotations

from typing import Any

import lightning as L
import pytest
from torch import nn

from datamodules.conditions import ClassLabels
from lit_shortcut.acceleration.shortcut import Shortcut
from lit_shortcut.bases.toy import ToyBase
from lit_shortcut.networks.shortcut import ShortcutNet
from lit_shortcut.sampling import Decoding
from lit_shortcut.tasks.generating import GenerateTask


@pytest.mark.parametrize(
    "arguments", [{}, {"compiled": True}, {"compiled": True, "compile_mode": "reduce-overhead"}], ids=str
)
def test_pictures_are_compiled_as_asked_for(arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, list[nn.Module], str]] = []
    monkeypatch.setattr("lit_shortcut.tasks.generating.compile_networks", lambda *found: seen.append(found))
    shortcut = Shortcut(ShortcutNet(width=16, num_heads=2))
    task = GenerateTask(ToyBase(), decoding=Decoding(num_steps=5), shortcut=shortcut, budget=2, **arguments)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    trainer.predict(task, datamodule=ClassLabels(2, batch_size=2))
    assert seen == [(task.base, [shortcut], arguments.get("compile_mode", "default"))] * bool(arguments)
