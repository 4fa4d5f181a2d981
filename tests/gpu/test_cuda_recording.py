"""Recording on a device; ``pytest -m gpu`` runs these where there is one."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from datamodules.conditions import ClassLabels
from lit_shortcut.callbacks.trajectory_writer import TrajectoryWriter
from lit_shortcut.contracts import Conditions, Trajectories
from lit_shortcut.sampling import Decoding
from lit_shortcut.tasks.recording import RecordingTask, record
from lit_shortcut.tasks.room import HostRing, HostRoom
from tests.gpu.cases import CASES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none"),
]

DEVICE, DECODING = torch.device("cuda", 0), Decoding(num_steps=6)


class Plain(RecordingTask):
    """Keeps features on the device and copies them at the end of each batch."""

    def predict_step(self, batch: Conditions, batch_idx: int) -> Future[Trajectories]:
        return HostRoom(0, Path()).finished(record(self.base, batch, self.decoding))


@pytest.mark.parametrize("encoding", ["bfloat16", "int8"])
@pytest.mark.parametrize("memory_limit_gb", [0.0, 8.0])
def test_recording_gives_the_bytes_of_features_copied_at_the_end(
    tmp_path: Path, encoding: str, memory_limit_gb: float
) -> None:
    quiet: dict[str, Any] = {"accelerator": "gpu", "devices": 1, "logger": False, "enable_progress_bar": False}
    found = []
    for kind in (RecordingTask, Plain):
        task = kind(
            CASES["maskgit"].make_base(),
            decoding=DECODING,
            memory_limit_gb=memory_limit_gb,
            scratch=tmp_path / "scratch",
        )
        folder = tmp_path / kind.__name__
        trainer = L.Trainer(**quiet, callbacks=[TrajectoryWriter(folder, encoding)])
        trainer.predict(task, ClassLabels(11, batch_size=4, num_classes=5))
        found.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert found[0] == found[1]


class Strict(HostRing):
    """Lets nothing wait for the device once the first step is computed."""

    def put(self, target: Tensor, source: Tensor) -> None:
        torch.cuda.set_sync_debug_mode("error")
        super().put(target, source)


@pytest.mark.parametrize("name", CASES)
def test_recording_waits_for_nothing(name: str, tmp_path: Path) -> None:
    base = CASES[name].make_base()
    assert isinstance(base, nn.Module)
    base.to(DEVICE)
    asked = CASES[name].conditions()
    conditions = Conditions(*(part.to(DEVICE) for part in asked[:3]), asked.prompts)
    expected = record(base, conditions, DECODING)
    room = Strict(DEVICE, 8.0, tmp_path)
    try:
        found = room.finished(record(base, conditions, DECODING, room)).result()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        room.close()
    for part in ("features", "tokens", "committed_at"):
        assert torch.equal(getattr(found, part), getattr(expected, part).cpu())
