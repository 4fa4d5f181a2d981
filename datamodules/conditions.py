"""Conditions of images to generate: classes or prompts in turn, each image with a seed of its own."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b, sha256
from math import ceil
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from datamodules.ranks import rank_and_world_size
from lit_shortcut.bounds import require_at_least
from lit_shortcut.callbacks.trajectory_writer import TrajectoryWriter
from lit_shortcut.contracts import Conditions


def hash_of(values: Sequence[str] | Sequence[int]) -> str:
    """Return the sha256 of a list of prompts or classes."""
    return sha256(json.dumps(list(values)).encode()).hexdigest()


def sample_seed(seed: int, index: int) -> int:
    """Return the int64 seed of sample ``index`` in a run with ``seed``, by a hash, so that seeds are unrelated."""
    return int.from_bytes(blake2b(f"{seed}:{index}".encode(), digest_size=8).digest(), "big", signed=True)


class _Batches(Dataset[Conditions]):
    """Batches of ``source`` under run seed ``seed``."""

    def __init__(self, source: InTurn, seed: int) -> None:
        self.source, self.seed = source, seed

    def __getitem__(self, index: int) -> Conditions:
        start = index * self.source.batch_size
        ids = range(start, min(start + self.source.batch_size, self.source.num_images))
        seeds = torch.tensor([self.source.seed_of(self.seed, i) for i in ids])
        labels = torch.tensor(ids) % self.source.num_classes
        return self.source.asked_for(Conditions(torch.tensor(ids), seeds, labels))

    def __len__(self) -> int:
        return ceil(self.source.num_images / self.source.batch_size)


class _Share(DistributedSampler[Conditions]):
    """One rank's share of ``batches``, each on exactly one rank; a rank may have none.

    Lightning keeps a ``DistributedSampler``; its own samplers repeat batches in test, and fail in predict on a rank
    without batches.
    """

    def __init__(self, dataset: _Batches, batches: Sequence[int], rank: int, world_size: int) -> None:
        self.batches = batches[rank::world_size]
        super().__init__(dataset, num_replicas=world_size, rank=rank, shuffle=False)

    def __iter__(self) -> Iterator[int]:  # type: ignore[override]  # torch's stub names the item, not its index
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def _only(batches: list[Conditions]) -> Conditions:
    (batch,) = batches
    return batch


class InTurn(L.LightningDataModule):
    """``num_images`` images, labels in turn. Image i depends only on ``seed`` and i, not on batches or ranks.

    Args:
        num_images: number of images to generate.
        batch_size: images per batch; predict records each batch as one shard.
        seed: run seed.
        num_classes: image i has label, the class or the number of a prompt, i modulo this.
        run_seeds: ``test`` generates all images under each of these; None takes only ``seed``.

    Raises:
        ValueError: if a number is below 1, or a run seed is given twice.
    """

    prompts_sha256 = ""
    """Hash of the list, of prompts say, that is gone through in turn; empty if that is all classes."""

    def __init__(
        self,
        num_images: int,
        batch_size: int = 32,
        seed: int = 0,
        num_classes: int = 10,
        run_seeds: list[int] | None = None,
    ) -> None:
        super().__init__()
        require_at_least(1, num_images=num_images, batch_size=batch_size, num_classes=num_classes)
        self.run_seeds = [seed] if run_seeds is None else run_seeds
        if not self.run_seeds or len(set(self.run_seeds)) < len(self.run_seeds):
            raise ValueError(f"run_seeds must be one or more different numbers, got {self.run_seeds}")
        self.num_images, self.batch_size, self.seed, self.num_classes = num_images, batch_size, seed, num_classes
        self.allow_zero_length_dataloader_with_multiple_devices = True  # there may be fewer batches than ranks

    def identity(self) -> dict[str, Any]:
        """Return JSON values that determine all conditions but their seeds."""
        return {"num_images": self.num_images, "num_classes": self.num_classes, "prompts": self.prompts_sha256}

    def seed_of(self, run_seed: int, index: int) -> int:
        """Return the seed of image ``index`` under ``run_seed``."""
        return sample_seed(run_seed, index)

    def asked_for(self, conditions: Conditions) -> Conditions:
        """Return ``conditions`` with the prompts that their labels stand for, if any."""
        return conditions

    def loader(self, seed: int | None = None) -> DataLoader[Conditions]:
        """Batches of :class:`Conditions`, distributed among the ranks, under ``seed`` or the run seed."""
        batches = _Batches(self, self.seed if seed is None else seed)
        return self._loader(batches, range(len(batches)))

    def test_dataloader(self) -> list[DataLoader[Conditions]]:
        """All batches under each of the run seeds."""
        return [self.loader(seed) for seed in self.run_seeds]

    def predict_dataloader(self) -> Iterable[Conditions]:
        """Batches without a finished shard in any :class:`TrajectoryWriter` of the trainer."""
        callbacks = self.trainer.callbacks if self.trainer else []  # type: ignore[attr-defined]  # Lightning sets it late
        finished = set[int]().union(*(one.finished for one in callbacks if isinstance(one, TrajectoryWriter)))
        batches = _Batches(self, self.seed)
        left = [index for index in range(len(batches)) if index not in finished]
        return self._loader(batches, left) if left else iter(())  # Lightning warns of a loader of length 0

    def _loader(self, batches: _Batches, indices: Sequence[int]) -> DataLoader[Conditions]:
        rank, world_size = rank_and_world_size(self)
        # batches of one instead of batch_size=None, so that Lightning knows which item a prediction belongs to
        return DataLoader(batches, batch_size=1, sampler=_Share(batches, indices, rank, world_size), collate_fn=_only)


class ClassLabels(InTurn):
    """``num_images`` images, classes in turn. Image i depends only on ``seed`` and i, not on batches or ranks."""
