from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path
from threading import active_count
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import Dataset

from datamodules.loading import EpochLoader
from datamodules.trajectories import TrajectoryDataModule
from lit_shortcut.contracts import Trajectories, Transition
from lit_shortcut.guidance import guide_rows
from lit_shortcut.sampling import Decoding
from lit_shortcut.trajectory import TrajectoryError
from tests.datamodules.opened import IDS, make, names, order
from tests.forged_shards import edit_index
from tests.tiny_trajectories import SPEC, adopt, card, interface, trajectories, write_set


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


def test_bfloat16_features_are_guided_in_float32(tmp_path: Path) -> None:
    write_set(tmp_path, encoding="bfloat16")
    module = make(tmp_path, guided=True)
    scales = Decoding.from_values(module.card.decoding).guidance_by_step
    batch = next(iter(module.train_dataloader())).decode()
    for row, (step, gap) in enumerate(zip(batch.step.tolist(), batch.gap.tolist(), strict=True)):
        both = trajectories([int(batch.features[row, 0, IDS].round())]).features[0].bfloat16().float()
        expected = guide_rows(both[:, None, step], scales[step + gap], SPEC.num_tokens)[0]
        torch.testing.assert_close(batch.features[row], expected, rtol=1e-5, atol=1e-5)


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


def test_each_batch_is_copied_to_a_gpu_before_the_one_before_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []

    class Copies:
        def __init__(self, device: torch.device) -> None:
            happened.append(str(device))

        def begin(self, batch: int | None) -> int | None:
            happened.append(f"begin {batch}")
            return batch

        def finish(self, begun: int | None) -> int | None:
            return begun

    class Numbers(Dataset[int | None]):
        def __getitem__(self, place: tuple[int, int]) -> int | None:
            return None if place[1] == 1 else place[1]

    monkeypatch.setattr("datamodules.loading.CopyStream", Copies)
    loader = EpochLoader(Numbers(), 4, device=torch.device("cuda", 1))
    done = []
    for number in loader:
        happened.append(f"use {number}")
        done.append(loader.state_dict()["done"])
    begun = ["cuda:1", "begin 0", "begin None", "use 0", "begin 2", "begin 3", "use 2", "use 3"]
    assert (happened, done) == (begun, [1, 3, 4])


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
