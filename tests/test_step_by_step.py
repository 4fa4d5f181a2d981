"""Recording that holds a few steps in memory: scratch files in its place, shards written as they are encoded."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor

from datamodules.conditions import ClassLabels
from lit_shortcut.bases.dimoo.adapter import DiMOO
from lit_shortcut.bases.toy import ToyBase
from lit_shortcut.callbacks.trajectory_writer import TrajectoryWriter
from lit_shortcut.contracts import Conditions, Trajectories
from lit_shortcut.sampling import Decoding
from lit_shortcut.tasks.recording import RecordingTask, record
from lit_shortcut.tasks.room import HostRoom
from lit_shortcut.trajectory import ENCODINGS, TrajectoryError, problems, read_shard, write_shard
from tests.tiny_trajectories import SPEC, card, trajectories

STATUS = Path("/proc/self/status")
DECODING = Decoding(num_steps=5)
ODD = {"spec": SPEC._asdict() | {"sequence_length": 9, "width": 5}, "num_steps": 3, "branches": 1}


def predict(folder: Path, encoding: str = "bfloat16", **arguments: Any) -> dict[str, bytes]:
    quiet: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    task = RecordingTask(ToyBase(), decoding=DECODING, scratch=folder / "scratch", **arguments)
    L.Trainer(**quiet, callbacks=[TrajectoryWriter(folder / "set", encoding)]).predict(
        task, ClassLabels(7, batch_size=3)
    )
    assert list(problems(folder / "set")) == []
    return {path.name: path.read_bytes() for path in (folder / "set").iterdir()}


def is_mapped(features: Tensor) -> bool:
    start = features.untyped_storage().data_ptr()
    (entry,) = (
        line
        for line in Path("/proc/self/maps").read_text().splitlines()
        if (bounds := [int(bound, 16) for bound in line.split()[0].split("-")])[0] <= start < bounds[1]
    )
    return "features-" in entry


def members(folder: Path, sample: str) -> dict[str, np.ndarray]:
    """Arrays of a sample of the first shard, as numpy reads them."""
    with tarfile.open(folder / "shard-000000.tar") as tar:
        names = [name for name in tar.getnames() if name.startswith(sample) and name.endswith(".npy")]
        return {
            name.partition(".")[2]: np.load(io.BytesIO(tar.extractfile(name).read()))  # type: ignore[union-attr]
            for name in names
        }


@pytest.mark.parametrize("encoding", ["bfloat16", "int8"])
def test_shards_are_the_same_with_and_without_a_scratch_file(tmp_path: Path, encoding: str) -> None:
    assert predict(tmp_path / "file", encoding, memory_limit_gb=0) == predict(tmp_path / "memory", encoding)
    assert list((tmp_path / "file" / "scratch").iterdir()) == []
    assert not (tmp_path / "memory" / "scratch").exists()


@pytest.mark.skipif(not STATUS.exists(), reason="mappings of a process are told by Linux alone")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_above_the_limit_are_mapped_from_a_file_without_a_name(tmp_path: Path, dtype: torch.dtype) -> None:
    base, conditions = ToyBase().to(dtype), Conditions(torch.arange(3), torch.arange(3), torch.arange(3))
    expected = record(base, conditions, DECODING)
    size = expected.features.numel() * dtype.itemsize / 1e9
    for limit in (0, size * 0.999, size):
        found = record(base, conditions, DECODING, HostRoom(limit, tmp_path / "scratch"))
        assert is_mapped(found.features) == (limit < size)
        assert found.features.dtype == dtype
        for name in ("features", "tokens", "committed_at"):
            assert torch.equal(getattr(found, name), getattr(expected, name))
    assert list((tmp_path / "scratch").iterdir()) == []


def test_texts_of_different_lengths_are_recorded_the_same_in_a_scratch_file(
    tmp_path: Path, dimoo: DiMOO, prompted: Callable[..., Conditions]
) -> None:
    expected = record(dimoo, prompted(3), DECODING)
    found = record(dimoo, prompted(3), DECODING, HostRoom(0, tmp_path))
    assert torch.equal(found.features, expected.features)
    assert found.prefix is not None
    assert expected.prefix is not None
    made = card(spec=dimoo.spec._asdict(), num_steps=5, prompts="0" * 64, text_rows=True, num_samples=3)
    for folder, one in (("file", found), ("memory", expected)):
        write_shard(tmp_path / folder, 0, one, made)
    file, memory = ((tmp_path / folder / "shard-000000.tar").read_bytes() for folder in ("file", "memory"))
    assert file == memory
    for row, one in enumerate(read_shard(tmp_path / "file", 0, made)):
        assert torch.equal(one.features[0], expected.features[row, :, :, : one.features.shape[3]])
        stored, lengths = members(tmp_path / "file", f"{row:08d}"), expected.prefix.lengths[row].tolist()
        assert stored["prefix.lengths.npy"].tolist() == lengths
        assert stored["prefix.control.npy"].tolist() == expected.prefix.control[row, 0, : lengths[0]].tolist()
        assert len(stored["c02.npy"]) - len(stored["u02.npy"]) == lengths[0] - lengths[1]
        assert stored["u02.npy"].tolist() == expected.features[row, 1, 2, : len(stored["u02.npy"])].tolist()
    assert len({one.features.shape for one in read_shard(tmp_path / "file", 0, made)}) == 3


def odd(encoding: str) -> tuple[Trajectories, dict[str, Any]]:
    """Samples of which no tensor's size is a multiple of another's type."""
    recorded = trajectories([0, 1, 2])
    changes = ODD | {"encoding": encoding}
    return recorded._replace(
        features=recorded.features[:, :1, :3, :9, :5], committed_at=recorded.committed_at.clamp(max=2)
    ), changes


@pytest.mark.parametrize("at_once", [1, 400, 2**22])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_members_are_the_same_however_many_steps_are_encoded_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str, at_once: int
) -> None:
    monkeypatch.setattr("lit_shortcut.trajectory.writing._AT_ONCE", at_once)
    recorded, changes = odd(encoding)
    write_shard(tmp_path, 0, recorded, card(**changes))
    found, expected = members(tmp_path, "00000001"), ENCODINGS[encoding].encode(recorded.features[1])
    assert found.keys() == {
        *(f"c{step:02d}.{part}" for step in range(3) for part in expected),
        *("tokens.npy", "committed_at.npy"),
    }
    for part, values in expected.items():
        stored = torch.stack([torch.from_numpy(found[f"c{step:02d}.{part}"]) for step in range(3)])
        assert torch.equal(stored.view(values.dtype), values[0])
    assert found["tokens.npy"].tolist() == recorded.tokens[1].tolist()
    assert found["committed_at.npy"].tolist() == recorded.committed_at[1].tolist()
    (_, one, _) = read_shard(tmp_path, 0, card(**changes))
    assert torch.equal(one.features[0], ENCODINGS[encoding].decode(expected))


@pytest.mark.parametrize("encoding", ["bfloat16", "int8"])
def test_infinity_at_the_last_step_leaves_finished_shards_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    monkeypatch.setattr("lit_shortcut.trajectory.writing._AT_ONCE", 1)
    write_shard(tmp_path, 0, trajectories([0, 1, 2]), card(encoding=encoding))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    recorded = trajectories([3, 4, 5])
    recorded.features[2, -1, -1, -1, -1] = torch.inf
    with pytest.raises(TrajectoryError, match=r"shard-000001\.tar: sample 00000005: .*found NaN or infinity"):
        write_shard(tmp_path, 1, recorded, card(encoding=encoding))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_disk_too_small_is_refused_before_anything_lies_on_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=3 * 10**9))
    message = r"scratch: the features of a batch need 4 GB of scratch space, and the disk has 3 GB free"
    with pytest.raises(TrajectoryError, match=message):
        HostRoom(3.9, tmp_path / "scratch").make(torch.empty(0), (1000, 1000, 1000))
    assert list((tmp_path / "scratch").iterdir()) == []


def test_space_gone_after_it_was_counted_is_an_error_and_no_broken_mapping(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full, raising=False)
    with pytest.raises(TrajectoryError, match=r"cannot make a scratch file of 4e-06 GB \(No space left on device\)"):
        HostRoom(0, tmp_path).make(torch.empty(0), (1000,))
    assert list(tmp_path.iterdir()) == []


def test_scratch_that_is_no_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "scratch").touch()
    with pytest.raises(TrajectoryError, match=r"scratch: cannot make a scratch file of .* \(File exists\)"):
        HostRoom(0, tmp_path / "scratch").make(torch.empty(0), (1000,))


@pytest.mark.parametrize("limit", [-1.0, float("nan")])
def test_limit_that_is_none_is_refused(limit: float) -> None:
    with pytest.raises(ValueError, match="memory_limit_gb must be at least 0, got"):
        RecordingTask(ToyBase(), memory_limit_gb=limit)


PROBE = """
import sys, threading, time
from pathlib import Path
import torch
from lit_shortcut.bases.toy import ToyBase
from lit_shortcut.contracts import Conditions
from lit_shortcut.sampling import Decoding
from lit_shortcut.tasks.recording import record
from lit_shortcut.tasks.room import HostRoom
from lit_shortcut.trajectory import write_shard
from tests.tiny_trajectories import card

ROWS, STEPS = 1250, 16

class Large(ToyBase):
    def __init__(self):
        super().__init__(grid=8, width=1000)
        self.spec = self.spec._replace(sequence_length=ROWS)

    def features(self, tokens, context, clock):
        return torch.full((2, len(tokens), ROWS, 1000), 0.5)

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

def growth(job):
    peak, done, start = [0], threading.Event(), anonymous()
    def watch():
        while not done.is_set():
            peak[0] = max(peak[0], anonymous() - start)
            time.sleep(0.001)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    result = job()
    done.set()
    watcher.join()
    return peak[0] / (2 * STEPS * ROWS * 1000 * 4), result

folder, base, ids = Path(sys.argv[1]), Large(), torch.zeros(1, dtype=torch.long)
decoding = Decoding(num_steps=STEPS, schedule="linear")
made = card(spec=base.spec._asdict(), num_steps=STEPS, num_samples=1, encoding=sys.argv[2])

def recorded(limit):
    return record(base, Conditions(ids, ids, ids), decoding, HostRoom(limit, folder))

recording, trajectories = growth(lambda: recorded(0.1))
writing, _ = growth(lambda: write_shard(folder, 0, trajectories, made))
del trajectories
print(recording, writing, growth(lambda: recorded(8))[0])
"""


@pytest.mark.skipif(not STATUS.exists(), reason="anonymous memory of a process is told by Linux alone")
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_memory_of_recording_and_writing_is_a_small_part_of_a_trajectory(tmp_path: Path, dtype: str) -> None:
    """A trajectory of 160 MB, in shares of it: with a limit below it, and in memory, which shows what is measured."""
    probe = [sys.executable, "-c", PROBE, str(tmp_path), dtype]
    run = subprocess.run(probe, check=False, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert run.returncode == 0, run.stderr
    recording, writing, in_memory = (float(share) for share in run.stdout.split())
    assert recording < 0.5
    assert writing < 0.5
    assert in_memory > 0.75
