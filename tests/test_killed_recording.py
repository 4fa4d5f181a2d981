"""Recording killed at random moments, and on a disk that fills up."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from lit_shortcut.trajectory import Card, finished_shards, problems, read_shard
from tests.command_line import TOY, lightning

OPTIONS = ("--data.num_images=48", "--data.batch_size=4", "--trainer.callbacks.dtype=int8")


def _record(folder: Path) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    lightning(folder, "predict", "--config", TOY / "extract.yaml", *OPTIONS)


def recording(folder: Path) -> BaseProcess:
    """A process of its own, forked because imports take longer than the recording."""
    process = multiprocessing.get_context("fork").Process(target=_record, args=(folder,))
    process.start()
    return process


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "runs/toy/trajectories").iterdir()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], float]:
    """The set recorded in one go, and the seconds from its first shard to its last."""
    folder = tmp_path_factory.mktemp("whole")
    process = recording(folder)
    process.join()
    assert process.exitcode == 0
    times = [path.stat().st_mtime for path in folder.glob("runs/toy/trajectories/shard-*.tar")]
    return contents(folder), max(times) - min(times)


@pytest.mark.parametrize("kills", [5, pytest.param(20, marks=pytest.mark.slow)])
def test_recording_killed_at_random_moments_ends_with_the_same_bytes(
    tmp_path: Path, whole: tuple[dict[str, bytes], float], kills: int
) -> None:
    expected, duration = whole
    rng, interrupted = random.Random(kills), 0
    for number in range(kills):
        folder = tmp_path / str(number)
        folder.mkdir()
        process = recording(folder)
        trajectories = folder / "runs/toy/trajectories"
        while not (trajectories / "card.json").exists():
            time.sleep(0.001)
        time.sleep(rng.uniform(0, duration))
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        card = Card.read(trajectories)
        left = finished_shards(trajectories, card)
        interrupted += 0 < len(left) < card.num_shards
        for index in left:
            assert [one.id for one in read_shard(trajectories, index, card)] == list(card.ids(index))
        again = recording(folder)
        again.join()
        assert contents(folder) == expected
        assert list(problems(trajectories)) == []
    assert interrupted > kills // 2
