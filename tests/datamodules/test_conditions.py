from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch

from datamodules.conditions import ClassLabels, sample_seed
from lit_shortcut.callbacks.trajectory_writer import TrajectoryWriter
from lit_shortcut.contracts import Conditions


def joined(batches: Any) -> Conditions:
    ids, seeds, labels, prompts = zip(*batches, strict=True)
    return Conditions(torch.cat(ids), torch.cat(seeds), torch.cat(labels), sum(prompts, ()))


def test_classes_come_in_turn_and_no_seed_twice() -> None:
    found = joined(ClassLabels(1000, batch_size=64, num_classes=7).loader())
    assert found.ids.tolist() == list(range(1000))
    assert found.labels.tolist() == [i % 7 for i in range(1000)]
    assert found.seeds.dtype == torch.int64
    assert len(set(found.seeds.tolist())) == 1000


def test_image_does_not_depend_on_its_batch() -> None:
    small, large = (joined(ClassLabels(50, batch_size=size, seed=3).loader()) for size in (7, 32))
    assert all(torch.equal(*pair) for pair in zip(small[:3], large[:3], strict=True))


def test_other_seed_gives_other_noise_and_the_same_classes() -> None:
    source = ClassLabels(50, seed=3)
    own, other, same = (joined(source.loader(seed)) for seed in (None, 4, 3))
    assert torch.equal(own.seeds, same.seeds)
    assert not set(own.seeds.tolist()) & set(other.seeds.tolist())
    assert torch.equal(own.labels, other.labels)


def test_seeds_stay_what_they_are() -> None:
    assert next(iter(ClassLabels(2).loader())).seeds.tolist() == [-3067905179431350174, -997663824475294132]


def test_every_batch_goes_to_one_rank_even_where_ranks_are_more() -> None:
    for world_size in (2, 3, 8):
        seen = []
        for rank in range(world_size):
            source = ClassLabels(50, batch_size=8)
            source.trainer = SimpleNamespace(global_rank=rank, world_size=world_size)
            seen += [i for batch in source.loader() for i in batch.ids.tolist()]
        assert sorted(seen) == list(range(50))


def test_predict_leaves_out_what_is_finished() -> None:
    source, writer = ClassLabels(50, batch_size=8), TrajectoryWriter(Path("set"))
    source.trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[writer])
    writer.finished = {0, 1, 2, 4, 5}
    assert [batch.ids[0].item() for batch in source.predict_dataloader()] == [24, 48]
    writer.finished = set(range(7))
    assert list(source.predict_dataloader()) == []


class Collect(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[list[int]] = []
        self.seeds: list[int] = []

    def test_step(self, batch: Conditions, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.seen.append(batch.ids.tolist())
        self.seeds += batch.seeds.tolist()

    def predict_step(self, batch: Conditions, batch_idx: int) -> list[int]:
        return batch.ids.tolist()


def trainer() -> L.Trainer:
    return L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)


def test_lightning_takes_the_batches_as_they_are() -> None:
    assert trainer().predict(Collect(), datamodule=ClassLabels(5, batch_size=2)) == [[0, 1], [2, 3], [4]]
    module = Collect()
    trainer().test(module, datamodule=ClassLabels(5, batch_size=2))
    assert module.seen == [[0, 1], [2, 3], [4]]


def test_test_goes_through_all_conditions_under_each_run_seed() -> None:
    module = Collect()
    trainer().test(module, datamodule=ClassLabels(3, batch_size=2, seed=5, run_seeds=[0, 7]))
    assert module.seen == [[0, 1], [2]] * 2
    assert module.seeds == [sample_seed(seed, index) for seed in (0, 7) for index in range(3)]


@pytest.mark.parametrize("seeds", [[0, 0], [3, 1, 3], []])
def test_run_seed_given_twice_is_refused(seeds: list[int]) -> None:
    with pytest.raises(ValueError, match="run_seeds"):
        ClassLabels(3, run_seeds=seeds)


def test_identity_changes_with_what_is_asked_for_and_not_with_batches_or_seeds() -> None:
    own = ClassLabels(5).identity()
    assert ClassLabels(5, batch_size=2, seed=3, run_seeds=[1, 2]).identity() == own
    assert ClassLabels(6).identity() != own
    assert ClassLabels(5, num_classes=9).identity() != own


@pytest.mark.parametrize("name", ["num_images", "batch_size", "num_classes"])
def test_nothing_to_generate_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        ClassLabels(**({"num_images": 5} | {name: 0}))
