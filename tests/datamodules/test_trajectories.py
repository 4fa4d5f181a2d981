from __future__ import annotations

import errno
import json
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from threading import Thread, active_count
from types import SimpleNamespace
from typing import Any

import fsspec
import lightning as L
import pytest
import torch
from torch.utils.data import Dataset

from datamodules.loading import EpochLoader
from datamodules.trajectories import TrajectoryDataModule
from lit_shortcut.contracts import Trajectories, Transition
from lit_shortcut.files import AccessError
from lit_shortcut.guidance import guide_rows
from lit_shortcut.sampling import Decoding
from lit_shortcut.trajectory import TrajectoryError, problems
from lit_shortcut.trajectory.source import Source
from tests.forged_shards import edit_index
from tests.tiny_trajectories import SPEC, adopt, card, interface, trajectories, write_set

IDS = 0  # the channel that holds the sample's id


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("set")
    write_set(path, num_samples=17)  # five full shards to train on and one of two samples
    return path


def make(
    folder: Path | str, *, rank: int = 0, world_size: int = 1, epoch: int = 0, **arguments: Any
) -> TrajectoryDataModule:
    module = TrajectoryDataModule(str(folder), **({"batch_size": 8} | arguments))
    module.trainer = SimpleNamespace(global_rank=rank, world_size=world_size, current_epoch=epoch, overfit_batches=0)
    module.setup("fit")
    return module


def names(batch: Transition) -> list[tuple[int, int, float]]:
    """What tells transitions apart: sample, step, and a value that differs between branches."""
    values = zip(batch.features[:, 0, IDS].tolist(), batch.step.tolist(), batch.features[:, 0, 1].tolist(), strict=True)
    return [(int(sample), step, value) for sample, step, value in values]


def order(module: TrajectoryDataModule) -> list[list[tuple[int, int, float]]]:
    return [names(batch.decode()) for batch in module.train_dataloader()]


def test_epoch_has_as_many_batches_as_transitions_fill(folder: Path) -> None:
    batches = list(make(folder).train_dataloader())
    assert len(batches) == len(make(folder).train_dataloader()) == 15 * 2 * 3 // 8
    assert {len(batch.replaced) for batch in batches} == {8}
    assert len(make(folder, world_size=2).train_dataloader()) == 15 * 2 * 3 // 16
    assert len(make(folder, window=2).train_dataloader()) == 15 * 2 * 2 // 8
    assert len(make(folder, max_gap=2).train_dataloader()) == 15 * 2 * (3 + 2) // 8


def test_guided_transitions_are_those_of_both_branches_guided_at_the_step_of_the_target(folder: Path) -> None:
    scales = Decoding(4, guidance=2.5).guidance_by_step
    module = make(folder, max_gap=3, guided=True)
    recorded = trajectories(list(range(15)))
    seen = set()
    for encoded in module.train_dataloader():
        batch = encoded.decode()
        for row, (step, gap) in enumerate(zip(batch.step.tolist(), batch.gap.tolist(), strict=True)):
            sample = int(batch.features[row, 0, IDS])
            both = recorded.features[sample]
            for found, at in ((batch.features[row], step), (batch.targets[row, 0], step + gap)):
                expected = guide_rows(both[:, None, at], scales[step + gap], SPEC.num_tokens)[0]
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
            seen.add((sample, step, gap))
    assert len(seen) == 15 * (3 + 2 + 1) // 8 * 8


def test_guided_transitions_need_guidance(tmp_path: Path) -> None:
    write_set(tmp_path)
    adopt(tmp_path, card(branches=1, decoding={"num_steps": 4, "schedule": "arccos", "guidance": 0.0}))
    with pytest.raises(TrajectoryError, match=r"guided must be false for a set recorded without guidance"):
        make(tmp_path, guided=True)


def test_epoch_sees_each_transition_once_and_validation_samples_never(folder: Path) -> None:
    seen = [name for batch in order(make(folder, batch_size=9)) for name in batch]
    assert len(seen) == len(set(seen)) == 15 * 2 * 3
    assert {sample for sample, _, _ in seen} == set(range(15))


def test_batches_mix_trajectories_and_steps(folder: Path) -> None:
    for batch in order(make(folder)):
        assert len({sample for sample, _, _ in batch}) > 2
        assert len({step for _, step, _ in batch}) > 1


def test_group_of_shards_is_gone_through_before_the_next(folder: Path) -> None:
    seen = [name for batch in order(make(folder, batch_size=9, shuffle_shards=2)) for name in batch]
    groups = [{sample // 3 for sample, _, _ in seen[start : start + 36]} for start in (0, 36, 72)]
    assert sorted(map(len, groups)) == [1, 2, 2]
    assert set.union(*groups) == set(range(5))


@pytest.mark.parametrize("shuffle_shards", [2, 16])
def test_two_ranks_see_together_what_one_sees(folder: Path, shuffle_shards: int) -> None:
    whole = order(make(folder, batch_size=6, shuffle_shards=shuffle_shards))
    ranks = [order(make(folder, rank=r, world_size=2, batch_size=3, shuffle_shards=shuffle_shards)) for r in range(2)]
    assert [first + second for first, second in zip(*ranks, strict=True)] == whole


def test_number_of_workers_changes_nothing(folder: Path) -> None:
    assert order(make(folder, num_workers=2)) == order(make(folder))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_that_are_held_keep_their_values_while_others_are_read(folder: Path, num_workers: int) -> None:
    held = list(make(folder, num_workers=num_workers).train_dataloader())
    assert [names(batch.decode()) for batch in held] == order(make(folder))


def test_transition_is_one_of_its_trajectory(folder: Path) -> None:
    batch = next(iter(make(folder).train_dataloader())).decode()
    for row, (sample, step, _) in enumerate(names(batch)):
        recorded = trajectories([sample])
        branch = [torch.equal(batch.features[row], recorded.features[0, g, step]) for g in (0, 1)].index(True)
        assert torch.equal(batch.targets[row, 0], recorded.features[0, branch, step + 1])
        places = batch.control.positions[row, 0][batch.control.is_real[row, 0]]  # type: ignore[index]
        assert torch.equal(places, (recorded.committed_at[0] == step).nonzero()[:, 0])


def test_same_seed_gives_the_same_order_and_epochs_differ(folder: Path) -> None:
    first = order(make(folder))
    assert order(make(folder)) == first
    assert order(make(folder, epoch=1)) != first
    assert order(make(folder, seed=1)) != first
    assert order(make(folder, rank=1, world_size=2)) != order(make(folder, rank=0, world_size=2))


def test_loader_kept_over_epochs_gives_each_its_own_order(folder: Path) -> None:
    module = make(folder)
    loader = module.train_dataloader()
    first = [names(batch.decode()) for batch in loader]
    module.trainer.current_epoch = 1
    assert [names(batch.decode()) for batch in loader] == order(make(folder, epoch=1)) != first


def test_resumed_epoch_goes_on_with_the_same_batches_and_reads_none_of_those_before(folder: Path) -> None:
    expected = order(make(folder, epoch=3))
    loader = make(folder, epoch=3).train_dataloader()
    begun = [names(batch.decode()) for batch in islice(loader, 4)]
    state = json.loads(json.dumps(loader.state_dict()))
    module = make(folder, epoch=3, num_workers=2)
    resumed = module.train_dataloader()
    resumed.load_state_dict(state)
    assert begun + [names(batch.decode()) for batch in resumed] == expected


def test_loader_left_in_the_middle_leaves_no_thread(folder: Path) -> None:
    before = active_count()
    batches = iter(make(folder, num_workers=3).train_dataloader())
    next(batches)
    assert active_count() > before
    del batches
    assert active_count() == before


def test_batches_are_made_no_more_than_two_a_thread_ahead() -> None:
    asked: list[int] = []

    class Numbers(Dataset[int | None]):
        def __getitem__(self, place: tuple[int, int]) -> int | None:
            asked.append(place[1])
            return None if place[1] == 3 else place[1]

    seen = []
    for number in EpochLoader(Numbers(), 12, num_workers=2):
        seen.append(number)
        assert len(asked) <= number + 4
    assert seen == [number for number in range(12) if number != 3]


def test_epoch_after_a_resumed_one_is_whole(folder: Path) -> None:
    module = make(folder)
    loader = module.train_dataloader()
    loader.load_state_dict({"epoch": 0, "done": len(loader), "layout": loader.state_dict()["layout"]})
    assert list(loader) == []
    module.trainer.current_epoch = 1
    assert len(list(loader)) == len(loader)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"world_size": 2}, "batch_size over all ranks was 8, is 16"),
        ({"seed": 1}, "seed was 0, is 1"),
        ({"shuffle_shards": 1}, "shuffle_shards was 16, is 1"),
        ({"validation_shards": 2}, "validation_shards was 1, is 2"),
    ],
)
def test_place_in_another_layout_is_refused(folder: Path, change: dict[str, int], message: str) -> None:
    state = make(folder).train_dataloader().state_dict()
    with pytest.raises(TrajectoryError, match=message):
        make(folder, **change).train_dataloader().load_state_dict(state)


class Watch(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[Any] = []
        self.validated: list[int] = []

    def training_step(self, batch: Transition, batch_idx: int) -> torch.Tensor:
        self.seen.append(names(batch))
        return self.weight.sum()

    def validation_step(self, batch: Trajectories, batch_idx: int) -> None:
        self.validated += batch.conditions.ids.tolist()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveAt(L.Callback):
    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("stop", [3, 11, 14])  # in the first epoch, at its end, in the second
def test_training_resumed_from_a_checkpoint_sees_what_one_run_sees(folder: Path, tmp_path: Path, stop: int) -> None:
    def fit(checkpoint: Path | None = None) -> Watch:
        module = Watch()
        trainer = L.Trainer(
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            max_steps=18,
            num_sanity_val_steps=0,
            callbacks=[] if checkpoint else [SaveAt(stop, tmp_path / "stopped.ckpt")],
            enable_checkpointing=False,
        )
        data = TrajectoryDataModule(str(folder), batch_size=8)
        trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
        return module

    whole = fit()
    assert len(whole.seen) == 18
    assert whole.validated == [15, 16]
    assert fit(tmp_path / "stopped.ckpt").seen == whole.seen[stop:]


def test_validation_reads_every_trajectory_once_over_ranks_and_workers(folder: Path) -> None:
    seen = [
        i
        for rank in range(2)
        for batch in make(
            folder, rank=rank, world_size=2, num_workers=2, validation_shards=4, validation_batch_size=2
        ).val_dataloader()
        for i in batch.conditions.ids.tolist()
    ]
    assert sorted(seen) == list(range(6, 17))


def test_validation_batches_whole_trajectories_and_keeps_the_last(folder: Path) -> None:
    batches = list(make(folder, validation_shards=2, validation_batch_size=3).val_dataloader())
    assert [len(batch.tokens) for batch in batches] == [3, 2]
    assert batches[0].features.shape == (3, 2, 4, 10, 6)
    expected = trajectories([12, 13, 14])
    assert torch.equal(batches[0].features, expected.features)
    assert torch.equal(batches[0].tokens, expected.tokens)
    assert torch.equal(batches[0].committed_at, expected.committed_at)
    assert batches[1].conditions.labels.tolist() == [5, 6]


def test_interface_is_the_recorded_one(folder: Path) -> None:
    assert torch.equal(make(folder).interface.head_weight, interface().head_weight)


def test_missing_folder_and_empty_folder_are_named(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(TrajectoryError, match=rf"{path}/card\.json"):
            make(path)


def test_missing_shard_is_named(tmp_path: Path) -> None:
    write_set(tmp_path)
    (tmp_path / "shard-000002.tar").unlink()
    with pytest.raises(TrajectoryError, match=r"shard-000002\.tar: missing, or not of the size .* 1 of 4 shards"):
        make(tmp_path)


def test_shard_cut_short_is_named(tmp_path: Path) -> None:
    write_set(tmp_path)
    path = tmp_path / "shard-000001.tar"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(TrajectoryError, match=r"shard-000001\.tar: missing, or not of the size"):
        make(tmp_path)


@pytest.mark.parametrize("num_workers", [0, 1])  # torch waits 5 s for a worker that failed
def test_shard_cut_short_with_a_fitting_index_is_named_when_read(tmp_path: Path, num_workers: int) -> None:
    write_set(tmp_path)
    path = tmp_path / "shard-000001.tar"
    path.write_bytes(path.read_bytes()[:5000])
    edit_index(tmp_path, 1, bytes=5000)
    with pytest.raises(TrajectoryError, match=r"shard-000001\.tar"):
        list(make(tmp_path, num_workers=num_workers).train_dataloader())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"validation_shards": 6},
            "validation_shards .* 6 of 6 shards, .* batches smaller than 3",
        ),
        ({"window": 4}, "window must be below 4.*got 4"),
        ({"max_gap": 4}, "max_gap must be below 4.*got 4"),
        ({"base_fingerprint": "feedfeedfeedfeed"}, "expected trajectories of base feedfeedfeedfeed, found 0123456789"),
    ],
)
def test_set_that_does_not_fit_the_arguments_is_refused(folder: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(TrajectoryError, match=message):
        make(folder, **change)


def test_set_too_small_for_a_batch_is_refused(folder: Path) -> None:
    with pytest.raises(TrajectoryError, match="90 training windows do not fill 1 batches of 91"):
        make(folder, batch_size=91).train_dataloader()


@pytest.mark.parametrize(
    "name", ["batch_size", "shuffle_shards", "validation_shards", "window", "max_gap", "validation_batch_size"]
)
def test_sizes_below_one_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        TrajectoryDataModule("somewhere", **{name: 0})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoding": "float16"}, "features: expected 10 rows"),
        ({"spec": SPEC._asdict() | {"width": 8}}, "features: expected 10 rows"),
    ],
)
def test_card_of_other_samples_is_noticed(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    made = write_set(tmp_path)
    adopt(tmp_path, replace(made, **change))
    with pytest.raises(TrajectoryError, match=message):
        next(iter(make(tmp_path).train_dataloader()))


@contextmanager
def served(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """The URL of ``folder``, and the paths that were asked for."""
    asked: list[str] = []

    class Noting(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            asked.append(self.path)

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Noting, directory=folder)) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


@pytest.fixture
def bucket(folder: Path) -> Iterator[str]:
    """The set in memory, by its URL."""
    store = fsspec.filesystem("memory")
    store.put(f"{folder}/", "/bucket/set/", recursive=True)
    yield "memory://bucket/set"
    store.rm("/bucket", recursive=True)


def test_set_behind_http_is_read_like_a_folder(folder: Path, tmp_path: Path) -> None:
    with served(folder) as (url, _):
        module = make(url, cache=tmp_path, shuffle_shards=1)
        assert order(module) == order(make(folder, shuffle_shards=1))
        assert torch.equal(module.interface.head_weight, interface().head_weight)
        assert [batch.conditions.ids.tolist() for batch in module.val_dataloader()] == [[15, 16]]
        module.teardown("fit")
        assert len(list(tmp_path.glob("*/shard-*.tar"))) <= 3  # this group's, its neighbour's, the validation's
        with pytest.raises(AccessError, match=r"nowhere/card\.json: cannot be fetched \(FileNotFoundError"):
            make(f"{url}/nowhere")


def test_what_a_killed_fetch_left_in_the_cache_is_deleted(folder: Path, tmp_path: Path, bucket: str) -> None:
    order(make(bucket, cache=tmp_path))
    (shard,) = tmp_path.glob("*/shard-000001.tar")
    (leftover := shard.with_name(".shard-000002.tar.4711")).write_bytes(b"part")
    shard.unlink()
    order(make(bucket, cache=tmp_path))
    assert not leftover.exists()


def test_cache_without_locks_is_refused_with_a_way_out(
    tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: Any) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("lit_shortcut.files.fcntl.flock", flock)
    with pytest.raises(AccessError, match=rf"{tmp_path}.*cannot be locked.*a file system with locks"):
        order(make(bucket, cache=tmp_path))


def test_shards_needed_first_are_fetched_first(tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[int]] = []
    read: list[int] = []

    def noted(self: Source, index: int, use: Any, own: Any = Source.read) -> Any:
        read.append(index)
        return own(self, index, use)

    monkeypatch.setattr(Source, "read", noted)
    monkeypatch.setattr(Source, "fetch_ahead", lambda self, indices: asked.append(list(indices)))
    order(make(bucket, cache=tmp_path, shuffle_shards=2))
    first, second, *_ = dict.fromkeys(read)
    assert {first, second} == set(asked[0][:2])
    assert len(set(asked[0])) == 4  # and then the next group


def test_set_in_an_object_store_is_read_like_a_folder(folder: Path, tmp_path: Path, bucket: str) -> None:
    assert order(make(bucket, cache=tmp_path, num_workers=2)) == order(make(folder))
    assert list(problems(bucket, tmp_path)) == []


def test_verification_reads_the_store_and_not_what_a_training_keeps_of_it(
    folder: Path, tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_shortcut.trajectory.source._CACHE", tmp_path)
    order(make(bucket))
    kept = sorted(tmp_path.glob("*/shard-*.tar"))
    assert len(kept) > 1
    fsspec.filesystem("memory").pipe("/bucket/set/shard-000001.tar", b"half")
    assert any("shard-000001.tar" in problem for problem in problems(bucket))
    assert sorted(tmp_path.glob("*/shard-*.tar")) == kept


@pytest.mark.parametrize(("protocol", "extra"), [("s3", "s3"), ("gs", "gs"), ("gcs", "gs")])
def test_missing_package_of_a_protocol_is_named_by_its_extra(
    protocol: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("s3fs", "gcsfs"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(AccessError, match=rf"{protocol}://.*pip install 'lit-shortcut\[{extra}\]'"):
        make(f"{protocol}://bucket/set")


def test_unknown_protocol_is_named() -> None:
    with pytest.raises(AccessError, match=r"nowhere://bucket/set/card\.json: .*Protocol not known: nowhere"):
        make("nowhere://bucket/set")


def damage(path: Path) -> None:
    """Flip a bit of the last step of the last sample."""
    samples = json.loads(path.with_suffix(".json").read_text())["samples"]
    offset, _, _ = samples[max(samples)]["u03.npy"]
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def test_shard_damaged_in_the_cache_is_fetched_again(folder: Path, tmp_path: Path, bucket: str) -> None:
    expected = order(make(bucket, cache=tmp_path))
    (path,) = tmp_path.glob("*/shard-000001.tar")
    damage(path)
    assert order(make(bucket, cache=tmp_path)) == expected
    path.write_bytes(b"half")
    assert order(make(bucket, cache=tmp_path)) == expected
    path.with_suffix(".json").write_text("half")
    assert order(make(bucket, cache=tmp_path)) == expected


def test_damaged_shard_behind_a_url_is_fetched_twice_and_only_its_damaged_sample_skipped(
    folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder, tmp_path / "set")
    damage(tmp_path / "set" / "shard-000001.tar")
    with served(tmp_path / "set") as (url, asked):
        module = make(url, cache=tmp_path / "cache", on_corrupt="skip", batch_size=9)
        seen = [name for batch in module.train_dataloader() for name in names(batch.decode())]
    assert len(seen) - len(set(seen)) == 1  # the last window of the sample's second branch
    assert asked.count("/shard-000001.tar") == 2
    with (
        served(tmp_path / "set") as (url, _),
        pytest.raises(TrajectoryError, match=r"http.*shard-000001\.tar: sample 00000005: u03.npy: checksum differs"),
    ):
        order(make(url, cache=tmp_path / "other", batch_size=9))


def test_shards_of_the_next_group_are_fetched_while_one_is_read(folder: Path, tmp_path: Path) -> None:
    with served(folder) as (url, asked):
        module = make(url, cache=tmp_path, shuffle_shards=2, num_workers=0)
        next(iter(module.train_dataloader()))
        deadline = time.monotonic() + 60
        while len(set(asked) & {f"/shard-{index:06d}.tar" for index in range(5)}) < 4 and time.monotonic() < deadline:
            time.sleep(0.05)
        module.teardown("fit")
        assert len([path for path in asked if path.endswith(".tar")]) == 4


def test_batches_to_overfit_are_those_of_the_first_epoch(folder: Path) -> None:
    module = Watch()
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        overfit_batches=2,
        max_epochs=3,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, TrajectoryDataModule(str(folder), batch_size=8))
    assert module.seen == 3 * order(make(folder))[:2]


def test_transitions_are_pinned_where_there_is_a_gpu_and_trajectories_are_not(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor.shape) or tensor)
    batch = next(iter(make(folder, num_workers=1).train_dataloader()))
    assert batch.features["npy"].shape in pinned
    assert batch.others.control.tokens.shape in pinned
    pinned.clear()
    assert isinstance(next(iter(make(folder, num_workers=1).val_dataloader())), Trajectories)
    assert not pinned
