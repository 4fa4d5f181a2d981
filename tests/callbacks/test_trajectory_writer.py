from __future__ import annotations

import errno
import logging
import shutil
import time
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch

from datamodules.conditions import ClassLabels
from lit_shortcut import trials
from lit_shortcut.background import Background
from lit_shortcut.callbacks import trajectory_writer
from lit_shortcut.callbacks.trajectory_writer import TrajectoryWriter
from lit_shortcut.contracts import Conditions, Context, Trajectories
from lit_shortcut.files import exclusive
from lit_shortcut.sampling import Decoding
from lit_shortcut.trajectory import Card, TrajectoryError, read_shard
from lit_shortcut.trajectory.index import finished_shards
from lit_shortcut.trajectory.interface_file import load_interface
from lit_shortcut.trajectory.writing import _Tar
from tests.tiny_trajectories import SPEC, interface, trajectories

TRIALS = ("fast_dev_run", "limit_predict_batches")


class Recorder(L.LightningModule):
    """Records what depends on the ids alone; raises at batch ``fails_at``."""

    def __init__(self, fails_at: int | None = None) -> None:
        super().__init__()
        self.base: Any = SimpleNamespace(
            spec=SPEC,
            fingerprint="0123456789abcdef",
            interface=interface(),
            identity=lambda: {"fingerprint": self.base.fingerprint},
            context=lambda conditions, guided: Context(),
        )
        self.decoding = Decoding(num_steps=4)
        self.fails_at, self.batches = fails_at, 0

    def predict_step(self, batch: Conditions, batch_idx: int) -> Future[Trajectories]:
        if self.batches == self.fails_at:
            raise RuntimeError("interrupted")
        self.batches += 1
        recorded: Future[Trajectories] = Future()
        recorded.set_result(trajectories(batch.ids.tolist())._replace(conditions=batch))
        return recorded


def predict(folder: Path, module: Recorder | None = None, num_images: int = 11, **arguments: Any) -> Recorder:
    module = module or Recorder()
    overwrite, encoding = arguments.pop("overwrite", False), arguments.pop("encoding", "bfloat16")
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        callbacks=[TrajectoryWriter(folder, encoding, overwrite=overwrite)],
        **{key: arguments.pop(key) for key in ("strategy", "devices", *TRIALS) if key in arguments},
    )
    trainer.predict(module, datamodule=ClassLabels(num_images, **({"batch_size": 3} | arguments)))
    return module


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def is_complete(folder: Path, card: Card) -> bool:
    return len(finished_shards(folder, card)) == card.num_shards


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    messages: list[str] = []
    for module in (trajectory_writer, trials):
        monkeypatch.setattr(module, "rank_zero_info", messages.append)
    return messages


def test_predict_records_a_set(tmp_path: Path, said: list[str]) -> None:
    assert predict(tmp_path / "set").batches == 4
    card = Card.read(tmp_path / "set")
    assert (card.num_samples, card.samples_per_shard, card.branches, card.encoding) == (11, 3, 2, "bfloat16")
    assert (card.base, card.precision, card.text_rows) == ({"fingerprint": "0123456789abcdef"}, "32-true", False)
    assert card.decoding["guidance"] == 2.8
    assert is_complete(tmp_path / "set", card)
    assert load_interface(tmp_path / "set", card).num_tokens == 9
    (one, *_) = read_shard(tmp_path / "set", 3, card)
    assert one.conditions.ids == 9
    assert one.conditions.seeds == next(iter(ClassLabels(11, batch_size=11).loader())).seeds[9]
    assert torch.equal(one.features, trajectories([9]).features.bfloat16())
    assert said[0].endswith("GB free")
    assert "recording 11 trajectories of 11" in said[0]
    assert "11 of 11 trajectories" in said[1]


def test_predictions_are_not_kept_in_memory(tmp_path: Path) -> None:
    module = Recorder()
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[TrajectoryWriter(tmp_path)]
    )
    assert trainer.predict(module, datamodule=ClassLabels(4, batch_size=2)) is None
    assert trainer.predict_loop.predictions == []


def test_interrupted_recording_goes_on_and_ends_the_same(tmp_path: Path, said: list[str]) -> None:
    predict(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="interrupted"):
        predict(tmp_path / "set", Recorder(fails_at=2))
    assert not is_complete(tmp_path / "set", Card.read(tmp_path / "set"))
    assert predict(tmp_path / "set").batches == 2
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")
    assert "recording 5 trajectories of 11" in said[-2]


def test_complete_set_is_left_alone(tmp_path: Path, said: list[str]) -> None:
    predict(tmp_path)
    before = contents(tmp_path)
    assert predict(tmp_path).batches == 0
    assert contents(tmp_path) == before
    assert said[-1] == (
        f"{tmp_path} is complete (11 trajectories); nothing to record; overwrite: true records it again"
    )


def test_other_set_is_refused_and_each_difference_named(tmp_path: Path) -> None:
    predict(tmp_path)
    before = contents(tmp_path)
    changes = "encoding was 'bfloat16' and is 'float32'; seed was 0 and is 5"
    with pytest.raises(TrajectoryError, match=changes) as caught:
        predict(tmp_path, encoding="float32", seed=5)
    assert "overwrite: true" in str(caught.value)
    assert contents(tmp_path) == before


def test_card_of_a_run_that_failed_before_its_first_shard_holds_nobody_up(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="interrupted"):
        predict(tmp_path / "set", Recorder(fails_at=0), num_images=5)
    predict(tmp_path / "set", num_images=11)
    assert is_complete(tmp_path / "set", Card.read(tmp_path / "set"))


def test_overwriting_leaves_nothing_of_the_old_set(tmp_path: Path) -> None:
    predict(tmp_path / "set")
    predict(tmp_path / "set", num_images=4, seed=5, overwrite=True)
    predict(tmp_path / "fresh", num_images=4, seed=5)
    assert contents(tmp_path / "set") == contents(tmp_path / "fresh")
    assert predict(tmp_path / "set", num_images=4, seed=5, overwrite=True).batches == 2


def test_interrupted_overwriting_goes_on(tmp_path: Path) -> None:
    predict(tmp_path)
    with pytest.raises(RuntimeError, match="interrupted"):
        predict(tmp_path, Recorder(fails_at=3), overwrite=True)
    assert predict(tmp_path, overwrite=True).batches == 1


def test_shards_without_a_card_are_not_mixed_with_new_ones(tmp_path: Path) -> None:
    predict(tmp_path)
    (tmp_path / "card.json").unlink()
    with pytest.raises(TrajectoryError, match="holds shards without a card"):
        predict(tmp_path)


def test_too_little_disk_is_said_before_anything_is_generated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    module = Recorder()
    with pytest.raises(TrajectoryError, match=r"11 trajectories of 11, about .* GB to record, but only 1e-06 GB free"):
        predict(tmp_path / "set", module)
    assert module.batches == 0
    assert contents(tmp_path / "set") == {".lock": b""}


def test_recording_without_conditions_is_refused(tmp_path: Path) -> None:
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[TrajectoryWriter(tmp_path)]
    )
    with pytest.raises(TrajectoryError, match="ClassLabels"):
        trainer.predict(Recorder(), dataloaders=torch.utils.data.DataLoader([0]))


@pytest.mark.parametrize("num_images", [11, 2])  # with 2 images the second rank has nothing to do
def test_two_ranks_record_what_one_records(tmp_path: Path, num_images: int) -> None:
    predict(tmp_path / "one", num_images=num_images)
    predict(tmp_path / "two", num_images=num_images, strategy="ddp_fork", devices=2)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_full_disk_ends_the_run_and_leaves_what_was_written_valid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = predict(tmp_path / "whole", num_images=30) and contents(tmp_path / "whole")
    write, written = _Tar._write, []

    def full(self: _Tar, content: bytes) -> None:
        written.append(len(content))
        if sum(written) > 120_000:
            raise OSError(28, "No space left on device")
        write(self, content)

    module = Recorder()
    with monkeypatch.context() as patch:
        patch.setattr(_Tar, "_write", full)
        with pytest.raises(OSError, match=r"shard-\d+\.tar: cannot be written \(No space left on device\)"):
            predict(tmp_path / "set", module, num_images=30)
    assert module.batches < 10  # it did not go on to the end
    found = contents(tmp_path / "set")
    assert {"shard-000000.tar", "shard-000001.tar"} <= found.keys()
    assert found.items() <= whole.items()
    predict(tmp_path / "set", num_images=30)
    assert contents(tmp_path / "set") == whole


@pytest.mark.parametrize(
    "trial", [{"fast_dev_run": True}, {"limit_predict_batches": 2}, {"limit_predict_batches": 0.5}]
)
def test_trial_run_writes_nothing_that_lasts_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, trial: dict[str, Any]
) -> None:
    written: list[Path] = []
    with pytest.MonkeyPatch.context() as patch:
        write = trajectory_writer.write_shard
        patch.setattr(
            trajectory_writer, "write_shard", lambda folder, *rest: (written.append(folder), write(folder, *rest))
        )
        with caplog.at_level(logging.INFO):
            module = predict(tmp_path / "set", overwrite=True, **trial)
    assert module.batches == len(written) == (1 if "fast_dev_run" in trial else 2)
    assert not (tmp_path / "set").exists()
    assert not any(folder.exists() for folder in written)
    assert f"a trial run: nothing is written to {tmp_path / 'set'}" in caplog.text


def test_error_in_writing_the_last_shard_is_raised_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = trajectory_writer.write_shard

    def failing(folder: Path, index: int, *arguments: Any) -> None:
        if index == 3:
            raise TrajectoryError("the last")
        write(folder, index, *arguments)

    monkeypatch.setattr(trajectory_writer, "write_shard", failing)
    with pytest.raises(TrajectoryError, match="the last"):
        predict(tmp_path / "set")
    assert finished_shards(tmp_path / "set", Card.read(tmp_path / "set")).keys() == {0, 1, 2}


def test_run_that_fails_writes_what_it_generated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = trajectory_writer.write_shard
    monkeypatch.setattr(trajectory_writer, "write_shard", lambda *words: (time.sleep(0.2), write(*words)))
    with pytest.raises(RuntimeError, match="interrupted"):
        predict(tmp_path / "set", Recorder(fails_at=2))
    assert finished_shards(tmp_path / "set", Card.read(tmp_path / "set")).keys() == {0, 1}


@pytest.mark.parametrize("waiting", [1, 3])
def test_no_more_batches_wait_than_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waiting: int) -> None:
    module, written, most = Recorder(), [0], [0]

    def slow(*_: Any) -> None:
        most[0] = max(most[0], module.batches - written[0])
        time.sleep(0.005)
        written[0] += 1

    monkeypatch.setattr(trajectory_writer, "write_shard", slow)
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        callbacks=[TrajectoryWriter(tmp_path, waiting=waiting)],
    )
    trainer.predict(module, datamodule=ClassLabels(24, batch_size=3))
    assert written == [8]
    assert most[0] <= waiting + 1  # and the one just generated


def test_jobs_give_their_results_in_order_and_raise_in_their_turn() -> None:
    def job(number: int) -> int:
        time.sleep(0.01 / (number + 1))
        if number == 3:
            raise ValueError("the fourth")
        return number

    jobs: Background[int] = Background(threads=4)
    for number in range(5):
        jobs.submit(job, number)
    found = jobs.results(leave=1)
    assert [next(found) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="the fourth"):
        next(found)
    assert list(jobs.results()) == [4]
    jobs.close()


def test_second_predict_into_a_folder_is_told_so_and_touches_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="interrupted"):
        predict(tmp_path, Recorder(fails_at=2))
    before, module = contents(tmp_path), Recorder()
    with (
        exclusive(tmp_path, wait=False),
        pytest.raises(TrajectoryError, match=f"{tmp_path}: another predict is recording into it"),
    ):
        predict(tmp_path, module, overwrite=True)
    assert module.batches == 0
    assert contents(tmp_path) == before
    predict(tmp_path, module)
    assert is_complete(tmp_path, Card.read(tmp_path))


def test_file_system_without_locks_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(*_: Any) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("lit_shortcut.files.fcntl.flock", flock)
    predict(tmp_path)
    assert f"{tmp_path}: cannot be locked (Function not implemented)" in caplog.text
    assert "do not start a second predict into it" in caplog.text
    assert is_complete(tmp_path, Card.read(tmp_path))


def test_difference_of_the_base_is_named_by_its_key(tmp_path: Path) -> None:
    predict(tmp_path)
    module = Recorder()
    module.base.fingerprint = "feedfeedfeedfeed"
    with pytest.raises(TrajectoryError, match=r"base\.fingerprint was '0123456789abcdef' and is 'feedfeedfeedfeed'"):
        predict(tmp_path, module)


def test_other_precision_is_another_set(tmp_path: Path) -> None:
    predict(tmp_path)
    trainer = L.Trainer(
        accelerator="cpu",
        precision="bf16-mixed",
        logger=False,
        enable_progress_bar=False,
        callbacks=[TrajectoryWriter(tmp_path)],
    )
    with pytest.raises(TrajectoryError, match="precision was '32-true' and is 'bf16-mixed'"):
        trainer.predict(Recorder(), datamodule=ClassLabels(11, batch_size=3))


def test_unknown_encoding_is_answered_with_the_choices(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="encoding must be one of int8, bfloat16, float16, float32, got int4"):
        TrajectoryWriter(tmp_path, "int4")


def test_leftovers_of_a_killed_run_are_deleted(tmp_path: Path) -> None:
    predict(tmp_path / "whole")
    (tmp_path / "set").mkdir()
    for name in (".card.json.7", ".shard-000001.tar.7", ".interface.safetensors.7"):
        (tmp_path / "set" / name).write_bytes(b"half")
    (tmp_path / "set" / ".env.local").write_bytes(b"another's")
    predict(tmp_path / "set")
    assert contents(tmp_path / "set") == contents(tmp_path / "whole") | {".env.local": b"another's"}
