"""Recorded trajectories: shuffled transitions to train on, whole trajectories to validate on."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

import lightning as L
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.ranks import rank_and_world_size
from lit_shortcut.contracts import Trajectories
from lit_shortcut.interface import TokenInterface
from lit_shortcut.metrics.functional import velocity_scale
from lit_shortcut.trajectory import (
    AccessError,
    Card,
    EncodedTransition,
    OnCorrupt,
    Order,
    Source,
    Trajectory,
    TrajectoryError,
    WindowReader,
    check_shards,
    is_remote,
    load_interface,
    locate,
    read_shard,
    stack,
)

Batch = TypeVar("Batch")
_MOST_SHARDS = 10**7  # 80 MB for their order; a card may claim any number
_log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Training(Dataset[EncodedTransition]):
    """Item (epoch, number): the batch of that number of one rank."""

    reader: WindowReader
    batch_size: int
    rank: int
    world_size: int

    def __getitem__(self, index: tuple[int, int]) -> EncodedTransition:
        epoch, number = index
        first = (number * self.world_size + self.rank) * self.batch_size
        return self.reader.read(epoch, range(first, first + self.batch_size))


@dataclass(eq=False)
class _Validation(Dataset[Trajectories | None]):
    """Item (epoch, number): the batch of that number; None where it has no samples, or skips all as damaged."""

    source: Source
    ids: Sequence[int]
    batch_size: int
    on_corrupt: OnCorrupt

    def __getitem__(self, index: tuple[int, int]) -> Trajectories | None:
        first = index[1] * self.batch_size
        found = [self._read(number) for number in self.ids[first : first + self.batch_size]]
        readable = [one for one in found if one is not None]
        return stack(readable) if readable else None

    def _read(self, number: int) -> Trajectory | None:
        shard, row = divmod(number, self.source.card.samples_per_shard)
        try:
            return self.source.shard(shard).trajectory(row)
        except TrajectoryError as error:
            if self.on_corrupt == "raise" or isinstance(error, AccessError):
                raise
            _log.warning("skipped: %s", error)
            return None


class EpochLoader(Generic[Batch]):
    """``length`` batches an epoch; taken up again where a checkpoint was saved, without reading what was seen.

    Lightning saves and restores its state. It has a length also because without one Lightning fetches a batch ahead,
    and the saved state would be off by one.

    Batches are made ahead by threads. Reading, checksums and tensors' arithmetic hold no lock of Python, and what a
    thread makes is where it is used: a process would copy each batch into shared memory first, which took 2 to 3 times
    as long as reading it.

    Args:
        batches: item (epoch, number) is a batch, or None where it is left out; threads ask for several at a time.
        length: batches in an epoch.
        epoch: tells the epoch's number; asked when it begins.
        layout: all that the order depends on, compared when a checkpoint is taken up.
        num_workers: threads, each of which is two batches ahead at most, in pinned memory where there is a GPU; 0 makes
            a batch when it is asked for.
    """

    def __init__(
        self,
        batches: Dataset[Batch | None],
        length: int,
        epoch: Callable[[], int] = lambda: 0,
        layout: dict[str, int | str] | None = None,
        num_workers: int = 0,
    ) -> None:
        self._batches, self._length, self._epoch, self._layout = batches, length, epoch, layout or {}
        self._num_workers = num_workers
        self._position, self._resume = (0, 0), (0, 0)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Batch]:
        epoch = self._epoch()
        done = self._resume[1] if self._resume[0] == epoch else 0
        self._resume = (0, 0)
        places = [(epoch, number) for number in range(done, self._length)]
        made = self._made_ahead(places) if self._num_workers else map(self._batches.__getitem__, places)
        for number, batch in enumerate(made, start=done + 1):
            self._position = (epoch, number)
            if batch is not None:
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

    def _made(self, place: tuple[int, int]) -> Batch | None:
        """The batch at ``place``, where a GPU can copy it while it computes."""
        batch = self._batches[place]
        if not torch.cuda.is_available():
            return batch
        pinned: Batch | None = apply_to_collection(batch, Tensor, Tensor.pin_memory)
        return pinned

    def _made_ahead(self, places: Sequence[tuple[int, int]]) -> Iterator[Batch | None]:
        threads = ThreadPoolExecutor(self._num_workers)
        waiting: deque[Future[Batch | None]] = deque()
        try:
            for place in places:
                waiting.append(threads.submit(self._made, place))
                if len(waiting) == 2 * self._num_workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            threads.shutdown(cancel_futures=True)


class TrajectoryDataModule(L.LightningDataModule):
    """Trains on shuffled transitions, validates on whole trajectories, both read from shards at any place.

    An epoch sees each training transition once, but for those that do not fill a batch of all ranks. The order depends
    on ``seed``, the epoch and ``shuffle_shards`` alone: D ranks of batch B see together what one of batch D · B sees,
    and the number of workers changes nothing.

    A reading thread holds up to two batches as stored, batch_size × (R + 1) × S × C × bytes per value each (0.1 GB for
    64 pairs of MaskGIT at 512×512 in int8), and some MB. Batches are decoded on the device they are trained on. In
    validation one thread holds up to two batches of decoded trajectories, validation_batch_size × G × N × S × C × 4
    bytes each (0.8 GB for 8 of MaskGIT at 512×512).

    Args:
        source: folder, or URL prefix that WebDataset opens (``https://…``, ``gs://…``, ``hf://…``).
        batch_size: transitions per batch and rank.
        num_workers: reading threads per rank; 0 reads when a batch is asked for.
        shuffle_shards: shards whose transitions are mixed at a time. Of a set behind a URL twice as many and those of
            the validation lie in ``cache``; the next are fetched while the present ones are read.
        validation_shards: the last shards of the set, kept aside for validation.
        window: R, steps in a transition.
        seed: of the order.
        base_fingerprint: refuse a set that another base recorded; None takes any.
        validation_batch_size: whole trajectories per validation batch.
        on_corrupt: what a damaged sample does: ``raise`` stops; with ``skip`` validation goes on without it, in
            training the next transition of the order stands in for each of its own, and the log names and counts them.
        cache: folder for fetched shards, ``~/.cache/lit-shortcut`` by default.
    """

    def __init__(
        self,
        source: str,
        batch_size: int = 64,
        *,
        num_workers: int = 1,
        shuffle_shards: int = 16,
        validation_shards: int = 1,
        window: int = 1,
        seed: int = 0,
        base_fingerprint: str | None = None,
        validation_batch_size: int = 8,
        on_corrupt: OnCorrupt = "raise",
        cache: Path | None = None,
    ) -> None:
        super().__init__()
        sizes = {
            "batch_size": batch_size,
            "shuffle_shards": shuffle_shards,
            "validation_shards": validation_shards,
            "window": window,
            "validation_batch_size": validation_batch_size,
        }
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if num_workers < 0:
            raise ValueError(f"num_workers must be at least 0, got {num_workers}")
        locate(source, "")
        self.source, self.batch_size, self.num_workers = source, batch_size, num_workers
        self.shuffle_shards, self.validation_shards, self.window = shuffle_shards, validation_shards, window
        self.seed, self.base_fingerprint, self.validation_batch_size = seed, base_fingerprint, validation_batch_size
        self.on_corrupt, self.cache = on_corrupt, cache
        self.num_replaced = 0

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
        if card.num_shards > _MOST_SHARDS:
            raise TrajectoryError(
                f"{self.source}: expected at most {_MOST_SHARDS} shards, its card tells {card.num_shards}"
            )
        if self.window >= card.num_steps:
            raise TrajectoryError(f"{self.source}: window must be below {card.num_steps} steps, got {self.window}")
        return card

    @cached_property
    def interface(self) -> TokenInterface:
        """The cheap ends of the base that recorded the set."""
        return load_interface(self.source, self.card)

    def velocity_scale(self) -> Tensor:
        """Standard deviation (C,) of the features' change in a step, at places still masked, over the first shard."""
        first = read_shard(self.source, 0, self.card)
        return velocity_scale((one.features, one.committed_at) for one in first)

    def setup(self, stage: str) -> None:
        """Look at all shards of a folder; those behind a URL are checked as they are fetched.

        Raises:
            TrajectoryError: if one is missing or cut short; with ``on_corrupt: skip`` the log says so.
        """
        card = self.card
        if is_remote(self.source):
            return
        try:
            check_shards(Path(self.source), card)
        except TrajectoryError as error:
            if self.on_corrupt == "raise":
                raise
            _log.warning("skipped: %s", error)

    def train_dataloader(self) -> EpochLoader[EncodedTransition]:
        """Batches of transitions, samples and steps mixed, in a new order each epoch."""
        card, (rank, world_size) = self.card, rank_and_world_size(self)
        order = self._order()
        length = len(order) // (self.batch_size * world_size)
        if not length:
            raise TrajectoryError(
                f"{self.source}: {len(order)} training windows do not fill {world_size} batches of {self.batch_size}"
            )
        reader = WindowReader(self._source(), order, self.window, self.on_corrupt)
        layout: dict[str, int | str] = {
            "set": card.digest,
            "batch_size over all ranks": self.batch_size * world_size,
            "shuffle_shards": self.shuffle_shards,
            "window": self.window,
            "seed": self.seed,
        }
        return EpochLoader(
            _Training(reader, self.batch_size, rank, world_size),
            length,
            lambda: self.trainer.current_epoch if self.trainer else 0,
            layout,
            self.num_workers,
        )

    def steps_of_batch(self, epoch: int, number: int) -> list[list[int]] | None:
        """Step before each window of training batch ``number`` of ``epoch``, rank by rank.

        None where it is not known beforehand, since others may stand in for damaged ones.
        """
        if self.on_corrupt == "skip":
            return None
        order, world_size = self._order(), rank_and_world_size(self)[1]
        firsts = (self.batch_size * (number * world_size + rank) for rank in range(world_size))
        return [order.steps_before(epoch, range(first, first + self.batch_size)) for first in firsts]

    def _order(self) -> Order:
        card = self.card
        starts, shards = card.num_steps - self.window, card.num_shards - self.validation_shards
        return Order(shards, card.samples_per_shard, card.branches, starts, self.shuffle_shards, self.seed)

    def val_dataloader(self) -> EpochLoader[Trajectories]:
        """Batches of whole :class:`Trajectories`, each on one rank exactly; the last may be smaller."""
        card, (rank, world_size) = self.card, rank_and_world_size(self)
        first = (card.num_shards - self.validation_shards) * card.samples_per_shard
        ids = range(first + rank, card.num_samples, world_size)
        batches = _Validation(self._source(), ids, self.validation_batch_size, self.on_corrupt)
        most = len(range(first, card.num_samples, world_size))  # Lightning leaves a rank out whose length is 0
        return EpochLoader(batches, -(-most // self.validation_batch_size), num_workers=min(1, self.num_workers))

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Count the transitions that stand in for damaged ones."""
        if isinstance(batch, EncodedTransition):
            self.num_replaced += int(batch.replaced.sum())
        return batch

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Leave whole trajectories on the host: validation moves them step by step."""
        if isinstance(batch, Trajectories):
            return batch
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Decode features on the device, after a quarter of their size has travelled there."""
        return batch.decode() if isinstance(batch, EncodedTransition) else batch

    def teardown(self, stage: str) -> None:
        """Say how many transitions stood in for damaged ones."""
        if self.num_replaced:
            _log.warning("%s: %d damaged training transitions were replaced by others", self.source, self.num_replaced)

    def _source(self) -> Source:
        return Source(self.source, self.card, kept=2 * self.shuffle_shards + self.validation_shards, cache=self.cache)
