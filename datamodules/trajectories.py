"""Recorded trajectories, streamed: shuffled transitions to train on, whole trajectories to validate on."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from lit_shortcut.contracts import Trajectories, Transition
from lit_shortcut.interface import TokenInterface
from lit_shortcut.trajectory import (
    Card,
    TrajectoryError,
    check_shards,
    collate,
    is_remote,
    load_interface,
    locate,
    read_shard,
    read_trajectory,
    stack,
    transitions,
)


def _rng(*parts: int) -> random.Random:
    return random.Random(repr(parts))  # noqa: S311 - an order to read in, no secret


def _place(rank: int, world_size: int) -> tuple[int, int]:
    """This reader's number among all readers, rank × worker, and how many there are."""
    worker = get_worker_info()
    number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
    return rank * workers + number, world_size * workers


@dataclass(eq=False)
class _Training(IterableDataset[Transition]):
    """Endless batches of one epoch. Rank and world are given, since a spawned worker knows no process group."""

    source: str
    card: Card
    shards: range
    rank: int
    world_size: int
    batch_size: int
    shuffle_buffer: int
    window: int
    seed: int
    epoch: int

    def __iter__(self) -> Iterator[Transition]:
        reader, readers = _place(self.rank, self.world_size)
        rng, items = _rng(self.seed, self.epoch, reader), self._transitions(reader, readers)
        buffer = list(islice(items, self.shuffle_buffer))
        batch = []
        for item in items:
            place = rng.randrange(len(buffer))
            batch.append(buffer[place])
            buffer[place] = item
            if len(batch) == self.batch_size:
                yield collate(batch)
                batch = []

    def _transitions(self, reader: int, readers: int) -> Iterator[Transition]:
        """This reader's share of endless passes over the shards, each pass in an order of its own.

        Where shards are fewer than readers, each is read by several, which take its samples in turn.
        """
        parts = -(-readers // len(self.shards))
        turn = 0
        for number in count():
            units = [(shard, part) for shard in self.shards for part in range(parts)]
            _rng(self.seed, self.epoch, -1, number).shuffle(units)
            for shard, part in units:
                if turn % readers == reader:
                    for sample in islice(read_shard(self.source, shard, self.card), part, None, parts):
                        yield from transitions(read_trajectory(sample, self.card), self.window)
                turn += 1


@dataclass(eq=False)
class _Validation(IterableDataset[Trajectories]):
    """Every sample of the shards once: readers take samples, not shards, in turn."""

    source: str
    card: Card
    shards: range
    rank: int
    world_size: int
    batch_size: int

    def __iter__(self) -> Iterator[Trajectories]:
        samples = chain.from_iterable(read_shard(self.source, shard, self.card) for shard in self.shards)
        reader, readers = _place(self.rank, self.world_size)
        mine = islice(samples, reader, None, readers)
        while batch := [read_trajectory(sample, self.card) for sample in islice(mine, self.batch_size)]:
            yield stack(batch)


class EpochLoader:
    """``length`` batches an epoch, the same on every rank; taken up again where a checkpoint was saved.

    Lightning saves and restores its state. It has a length also because without one Lightning fetches a batch ahead,
    and the saved state would be off by one. Batches already seen are read again and thrown away.

    Args:
        batches: the batches of an epoch, given its number; at least ``length`` of them.
        epoch: tells the epoch's number; asked when it begins.
        length: batches in an epoch.
        layout: all that the order depends on, compared when a checkpoint is taken up.
    """

    def __init__(
        self,
        batches: Callable[[int], Iterable[Transition]],
        epoch: Callable[[], int],
        length: int,
        layout: dict[str, int],
    ) -> None:
        self._batches, self._epoch, self._length, self._layout = batches, epoch, length, layout
        self._position, self._resume = (0, 0), (0, 0)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Transition]:
        epoch = self._epoch()
        seen = self._resume[1] if self._resume[0] == epoch else 0
        self._resume = (0, 0)
        if seen >= self._length:
            return
        for number, batch in enumerate(islice(self._batches(epoch), self._length), start=1):
            if number > seen:
                self._position = (epoch, number)
                yield batch

    def state_dict(self) -> dict[str, Any]:
        """The epoch, how many of its batches are done, and the layout that makes this number mean something."""
        epoch, done = self._position
        return {"epoch": epoch, "done": done, "layout": self._layout}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up ``state`` at the next iteration.

        Raises:
            TrajectoryError: if batches would come in another order than when the checkpoint was saved.
        """
        changes = [
            f"{name} was {state['layout'].get(name)}, is {value}"
            for name, value in self._layout.items()
            if state["layout"].get(name) != value
        ]
        if changes:
            raise TrajectoryError(f"the checkpoint's place among the batches is lost: {', '.join(changes)}")
        self._position = self._resume = (state["epoch"], state["done"])


class TrajectoryDataModule(L.LightningDataModule):
    """Trains on shuffled transitions, validates on whole trajectories, both streamed from shards.

    An epoch has as many batches as fill up with the training transitions, whatever rank reads which: about once each.
    Not exactly: what is in the buffers when an epoch ends is left, and as many transitions of a second pass seen.

    Args:
        source: folder, or URL prefix that WebDataset opens (``https://…``).
        batch_size: transitions per batch and rank.
        num_workers: reading processes per rank.
        shuffle_buffer: transitions that each reading process holds to draw batches from. They take shuffle_buffer ×
            (R + 1) × S × C × bytes per value of memory: 3.2 GB for 1024 pairs of MaskGIT at 512×512 in bfloat16.
        validation_shards: the last shards of the set, kept aside for validation.
        window: R, steps in a transition.
        seed: of the order.
        base_fingerprint: refuse a set that another base recorded; None takes any.
        validation_batch_size: whole trajectories per validation batch.
    """

    def __init__(
        self,
        source: str,
        batch_size: int = 64,
        *,
        num_workers: int = 0,
        shuffle_buffer: int = 1024,
        validation_shards: int = 1,
        window: int = 1,
        seed: int = 0,
        base_fingerprint: str | None = None,
        validation_batch_size: int = 8,
    ) -> None:
        super().__init__()
        sizes = {
            "batch_size": batch_size,
            "shuffle_buffer": shuffle_buffer,
            "validation_shards": validation_shards,
            "window": window,
            "validation_batch_size": validation_batch_size,
        }
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        locate(source, "")
        self.source, self.batch_size, self.num_workers = source, batch_size, num_workers
        self.shuffle_buffer, self.validation_shards, self.window = shuffle_buffer, validation_shards, window
        self.seed, self.base_fingerprint, self.validation_batch_size = seed, base_fingerprint, validation_batch_size

    @cached_property
    def card(self) -> Card:
        """The set's card, checked against the arguments.

        Raises:
            TrajectoryError: if it cannot be read, or the set does not fit the arguments.
        """
        card = Card.read(self.source)
        if self.base_fingerprint not in (None, card.base_fingerprint):
            raise TrajectoryError(
                f"{self.source}: expected trajectories of base {self.base_fingerprint}, found {card.base_fingerprint}"
            )
        if self.validation_shards >= card.num_shards:
            raise TrajectoryError(
                f"{self.source}: validation_shards must be below {card.num_shards}, the shards of the set, "
                f"got {self.validation_shards}"
            )
        if self.window >= card.num_steps:
            raise TrajectoryError(f"{self.source}: window must be below {card.num_steps} steps, got {self.window}")
        return card

    @cached_property
    def interface(self) -> TokenInterface:
        """The cheap ends of the base that recorded the set."""
        return load_interface(self.source)

    def velocity_scale(self) -> Tensor:
        """Standard deviation (C,) of the features' change in a step, at places still masked, over the first shard."""
        total = squares = torch.zeros(self.card.spec["width"], dtype=torch.float64)
        rows = 0
        for sample in read_shard(self.source, 0, self.card):
            one = read_trajectory(sample, self.card)
            velocity = one.features.float().diff(dim=1)[:, :, : len(one.tokens)]
            is_masked = one.committed_at > torch.arange(velocity.shape[1])[:, None]
            counted = velocity[:, is_masked].flatten(0, -2).double()
            total, squares, rows = total + counted.sum(0), squares + counted.square().sum(0), rows + len(counted)
        scale = (squares / rows - (total / rows).square()).clamp(min=0).sqrt().float()
        return scale.where(scale > 0, 1)  # a channel that never changes has no error to scale

    def setup(self, stage: str) -> None:
        """Look at all shards of a folder; those behind a URL are checked as they are read."""
        card = self.card
        if not is_remote(self.source):
            check_shards(Path(self.source), card)

    def train_dataloader(self) -> EpochLoader:
        """Batches of :class:`Transition`, samples and steps mixed, in a new order each epoch."""
        card, (rank, world_size) = self.card, self._ranks()
        shards = range(card.num_shards - self.validation_shards)
        windows = len(shards) * card.samples_per_shard * card.branches * (card.num_steps - self.window)
        length = windows // (self.batch_size * world_size)
        if not length:
            raise TrajectoryError(
                f"{self.source}: {windows} training windows do not fill {world_size} batches of {self.batch_size}"
            )

        def batches(epoch: int) -> DataLoader[Transition]:
            # made anew each epoch, so that workers know its number
            return DataLoader(
                _Training(
                    self.source,
                    card,
                    shards,
                    rank,
                    world_size,
                    self.batch_size,
                    self.shuffle_buffer,
                    self.window,
                    self.seed,
                    epoch,
                ),
                batch_size=None,
                num_workers=self.num_workers,
            )

        layout = {
            "world_size": world_size,
            "num_workers": self.num_workers,
            "batch_size": self.batch_size,
            "shuffle_buffer": self.shuffle_buffer,
            "window": self.window,
            "seed": self.seed,
        }
        return EpochLoader(batches, lambda: self.trainer.current_epoch if self.trainer else 0, length, layout)

    def val_dataloader(self) -> DataLoader[Trajectories]:
        """Batches of whole :class:`Trajectories`, each on one rank exactly; the last may be smaller."""
        card, (rank, world_size) = self.card, self._ranks()
        shards = range(card.num_shards - self.validation_shards, card.num_shards)
        dataset = _Validation(self.source, card, shards, rank, world_size, self.validation_batch_size)
        return DataLoader(dataset, batch_size=None, num_workers=self.num_workers)

    def _ranks(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
