"""Features on their way to the host's memory; the ring runs on a CPU, too, whose streams are none."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from math import inf
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from datamodules.conditions import ClassLabels
from lit_shortcut.bases.dimoo.adapter import DiMOO
from lit_shortcut.bases.toy import ToyBase
from lit_shortcut.callbacks.trajectory_writer import TrajectoryWriter
from lit_shortcut.contracts import Conditions, Trajectories
from lit_shortcut.sampling import Decoding
from lit_shortcut.tasks import room
from lit_shortcut.tasks.recording import RecordingTask, record
from lit_shortcut.tasks.room import HostRing, HostRoom
from lit_shortcut.trajectory import problems

CPU, DECODING = torch.device("cpu"), Decoding(num_steps=7)


def conditions(count: int = 3) -> Conditions:
    ids = torch.arange(count)
    return Conditions(ids, ids + 5, ids)


@pytest.fixture
def small_ring(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two buffers, which a step fills many times, the last time in part."""
    monkeypatch.setattr(room, "_BUFFERS", 2)
    monkeypatch.setattr(room, "_BUFFER_BYTES", 200)


def predict(folder: Path, make_room: Callable[..., HostRoom], encoding: str, limit: float) -> dict[str, bytes]:
    task = RecordingTask(ToyBase(), decoding=DECODING, memory_limit_gb=limit, scratch=folder / "scratch")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lit_shortcut.tasks.recording.room_of", make_room)
        L.Trainer(
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            callbacks=[TrajectoryWriter(folder / "set", encoding)],
        ).predict(task, ClassLabels(7, batch_size=3))
    assert list(problems(folder / "set")) == []
    return {path.name: path.read_bytes() for path in (folder / "set").iterdir()}


@pytest.mark.usefixtures("small_ring")
@pytest.mark.parametrize("encoding", ["bfloat16", "int8"])
@pytest.mark.parametrize("limit", [0.0, 8.0])
def test_ring_and_plain_copies_record_the_same_bytes(tmp_path: Path, encoding: str, limit: float) -> None:
    def plain(_: torch.device, *arguments: Any) -> HostRoom:
        return HostRoom(*arguments)

    assert predict(tmp_path / "ring", HostRing, encoding, limit) == predict(tmp_path / "plain", plain, encoding, limit)


@pytest.mark.usefixtures("small_ring")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_leaves_through_the_ring_is_what_was_computed(dtype: torch.dtype, tmp_path: Path) -> None:
    base = ToyBase().to(dtype)
    expected, ring = record(base, conditions(), DECODING), HostRing(CPU, inf, tmp_path)
    futures = [ring.finished(record(base, conditions(), DECODING, ring)) for _ in range(2)]
    for future in futures:
        for name in ("features", "tokens", "committed_at"):
            assert torch.equal(getattr(future.result(), name), getattr(expected, name))
    ring.close()


@pytest.mark.usefixtures("small_ring")
def test_texts_leave_with_their_features(tmp_path: Path, dimoo: DiMOO, prompted: Callable[..., Conditions]) -> None:
    expected, ring = record(dimoo, prompted(3), DECODING), HostRing(CPU, inf, tmp_path)
    found = ring.finished(record(dimoo, prompted(3), DECODING, ring)).result()
    ring.close()
    assert torch.equal(found.features, expected.features)
    assert found.conditions.prompts == expected.conditions.prompts
    assert found.prefix is not None
    assert expected.prefix is not None
    for ours, theirs in zip(found.prefix, expected.prefix, strict=True):
        assert torch.equal(ours, theirs)


def test_no_more_than_three_steps_wait_on_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, done, most = [0], [0], [0]
    copy = HostRing._copy

    def slow(*arguments: Any) -> None:
        time.sleep(0.005)
        copy(*arguments)
        done[0] += 1

    class Counted(HostRing):
        def put(self, target: Tensor, source: Tensor) -> None:
            super().put(target, source)
            begun[0] += 1
            most[0] = max(most[0], begun[0] - done[0])

    monkeypatch.setattr(HostRing, "_copy", slow)
    ring = Counted(CPU, inf, tmp_path)
    ring.finished(record(ToyBase(), conditions(), DECODING, ring)).result()
    ring.close()
    assert done == begun == [7]
    assert most == [3]


@pytest.mark.parametrize("step", [0, 6])
def test_copy_that_fails_leaves_no_trajectories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    copy, copied = HostRing._copy, list[int]()

    def failing(*arguments: Any) -> None:
        copied.append(len(copied))
        if copied[-1] == step:
            raise RuntimeError("lost")
        copy(*arguments)

    monkeypatch.setattr(HostRing, "_copy", failing)
    ring = HostRing(CPU, inf, tmp_path)

    def recorded() -> Future[Trajectories]:
        return ring.finished(record(ToyBase(), conditions(), DECODING, ring))

    with pytest.raises(RuntimeError, match="lost"):
        recorded().result()
    with suppress(RuntimeError):
        ring.close()


def test_batch_above_the_limit_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(room, "rank_zero_info", said.append)
    kept = HostRoom(1e-6, tmp_path / "scratch")
    for count in (250, 251, 251):
        kept.make(torch.empty(0), (count,))
    assert said == [
        "the features of a batch take 1e-06 GB, more than memory_limit_gb: 1e-06; they go through files in "
        f"{tmp_path / 'scratch'}"
    ]
