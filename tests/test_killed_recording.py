"""Recording killed at random moments."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import lightning as L
import pytest

from datamodules.conditions import ClassLabels
from lit_shortcut.bases.toy import ToyBase
from lit_shortcut.callbacks.trajectory_writer import TrajectoryWriter
from lit_shortcut.sampling import Decoding
from lit_shortcut.tasks.recording import RecordingTask
from lit_shortcut.trajectory import Card, problems, read_shard
from lit_shortcut.trajectory.index import finished_shards


def _record(folder: Path) -> None:
    """As ``configs/toy/extract.yaml``, without the seconds that the command line takes."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        callbacks=[TrajectoryWriter(folder, "int8")],
    )
    task = RecordingTask(ToyBase(), decoding=Decoding(num_steps=6))
    trainer.predict(task, datamodule=ClassLabels(48, batch_size=4), return_predictions=False)


def recording(folder: Path) -> BaseProcess:
    """A process of its own, forked because imports take longer than the recording."""
    process = multiprocessing.get_context("fork").Process(target=_record, args=(folder,))
    process.start()
    return process


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], float]:
    """The set recorded in one go, and the seconds from its first shard to its last."""
    folder = tmp_path_factory.mktemp("whole")
    process = recording(folder)
    process.join()
    assert process.exitcode == 0
    times = [path.stat().st_mtime for path in folder.glob("shard-*.tar")]
    return contents(folder), max(times) - min(times)


@pytest.mark.parametrize("kills", [5, pytest.param(20, marks=pytest.mark.slow)])
def test_recording_killed_at_random_moments_ends_with_the_same_bytes(
    tmp_path: Path, whole: tuple[dict[str, bytes], float], kills: int
) -> None:
    expected, duration = whole
    rng, interrupted = random.Random(kills), 0
    for number in range(kills):
        folder = tmp_path / str(number)
        process = recording(folder)
        while not (folder / "card.json").exists():
            time.sleep(0.001)
        time.sleep(rng.uniform(0, duration))
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        card = Card.read(folder)
        left = finished_shards(folder, card)
        interrupted += 0 < len(left) < card.num_shards
        for index in left:
            assert [int(one.conditions.ids) for one in read_shard(folder, index, card)] == list(card.ids(index))
        again = recording(folder)
        again.join()
        assert contents(folder) == expected
        assert list(problems(folder)) == []
    assert interrupted
