"""Recorded trajectories: shuffled transitions to train on, whole trajectories to validate on."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from datamodules.loading import EpochLoader, epoch_of
from datamodules.ranks import rank_and_world_size
from datamodules.transitions import TransitionDataModule
from datamodules.windows import OnCorrupt, Order, WindowReader, require_spans
from lit_shortcut.bounds import require_at_least
from lit_shortcut.contracts import Trajectories
from lit_shortcut.files import is_remote
from lit_shortcut.inputs import located_source
from lit_shortcut.interface import TokenInterface
from lit_shortcut.trajectory import Card, Source, TrajectoryError
from lit_shortcut.trajectory.index import check_shards
from lit_shortcut.trajectory.interface_file import load_interface
from lit_shortcut.trajectory.transitions import EncodedTransition, concatenated

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Training(Dataset[EncodedTransition]):
    """One rank's batches by (epoch, number)."""

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
    """Batches by (epoch, number); None if one has no samples, or all are skipped as damaged."""

    source: Source
    ids: Sequence[int]
    batch_size: int
    on_corrupt: OnCorrupt

    def __getitem__(self, index: tuple[int, int]) -> Trajectories | None:
        first = index[1] * self.batch_size
        found = [self._read(number) for number in self.ids[first : first + self.batch_size]]
        readable = [one for one in found if one is not None]
        return concatenated(readable) if readable else None

    def _read(self, number: int) -> Trajectories | None:
        shard, row = divmod(number, self.source.card.samples_per_shard)
        try:
            return self.source.read(shard, lambda opened: opened.trajectory(row))
        except TrajectoryError as error:
            if self.on_corrupt == "raise":
                raise
            _log.warning("skipped: %s", error)
            return None


class TrajectoryDataModule(TransitionDataModule):
    """Training on shuffled transitions and validation on whole trajectories, by random access to recorded shards.

    An epoch sees each training transition once, but for a rest that does not fill a batch on all ranks. The order
    depends only on ``seed``, the epoch and ``shuffle_shards``: D ranks with batch size B together see what one with
    batch size D · B sees, for any number of workers.

    A reading thread holds up to two batches as stored, batch_size × (R + 1) × S × C × bytes per value each (0.1 GB for
    64 pairs of MaskGIT at 512×512 in int8; G times as much if ``guided``), and some MB. Batches are decoded on the
    training device. In validation one thread holds up to two batches of trajectories, validation_batch_size × G × N × S
    × C × bytes per value each, decoded: in int8 or float32 0.8 GB for 8 of MaskGIT at 512×512, and 8.9 GB for 1 of
    Lumina-DiMOO at 1024×1024, which takes 4.5 GB in bfloat16.

    Args:
        source: folder, or URL prefix that fsspec opens (``https://…``, ``s3://…``, ``gs://…``, ``hf://…``).
        batch_size: transitions per batch and rank.
        num_workers: reading threads per rank; 0 reads each batch on demand.
        shuffle_shards: number of shards whose transitions are mixed. For a set behind a URL, ``cache`` holds twice as
            many and those of the validation; the next ones are fetched while the present ones are read.
        validation_shards: number of the last shards of the set, held out for validation.
        window: R, consecutive steps that a transition has as targets.
        max_gap: largest number of steps from the features of a transition to its target, for anchored networks: every
            two steps at most this far apart are a transition, and only these two are read. Above 1, ``window`` is 1.
        guided: transitions are of the guided features, for guided networks: all branches are read for each.
        seed: seed of the order.
        base_fingerprint: refuse a set recorded by another base; None takes any.
        validation_batch_size: whole trajectories per validation batch.
        on_corrupt: treatment of damaged samples: ``raise`` stops; ``skip`` leaves them out of validation, replaces
            their training transitions by the next ones of the order, and logs their names and number.
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
        max_gap: int = 1,
        guided: bool = False,
        seed: int = 0,
        base_fingerprint: str | None = None,
        validation_batch_size: int = 8,
        on_corrupt: OnCorrupt = "raise",
        cache: Path | None = None,
    ) -> None:
        super().__init__()
        require_at_least(1, batch_size=batch_size, shuffle_shards=shuffle_shards, validation_shards=validation_shards)
        require_at_least(1, validation_batch_size=validation_batch_size)
        require_spans(window=window, max_gap=max_gap)
        require_at_least(0, num_workers=num_workers)
        self.source, self.batch_size, self.num_workers = located_source(source), batch_size, num_workers
        self.shuffle_shards, self.validation_shards = shuffle_shards, validation_shards
        self.window, self.max_gap, self.guided = window, max_gap, guided
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
                f"{self.source}: validation_shards holds out {self.validation_shards} of {card.num_shards} shards, "
                "which leaves none to train on. A shard is a batch of predict: record in batches smaller than "
                f"{card.samples_per_shard}, or more images than {card.num_samples}"
            )
        try:
            require_spans(card.num_steps, window=self.window, max_gap=self.max_gap)
        except ValueError as error:
            raise TrajectoryError(f"{self.source}: {error}") from error
        if self.guided and card.branches == 1:
            raise TrajectoryError(f"{self.source}: guided must be false for a set recorded without guidance; got true")
        return card

    @cached_property
    def interface(self) -> TokenInterface:
        """The cheap ends of the base that recorded the set."""
        return load_interface(self.source, self.card)

    @cached_property
    def _shards(self) -> Source:
        return Source(self.source, self.card, kept=2 * self.shuffle_shards + self.validation_shards, cache=self.cache)

    def setup(self, stage: str) -> None:
        """Check the sizes of all shards in a folder; shards behind a URL are checked as they are fetched.

        Raises:
            TrajectoryError: if one is missing or truncated; with ``on_corrupt: skip`` it is logged instead.
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
        """Batches of transitions, with samples and steps shuffled, in a new order each epoch."""
        card, (rank, world_size) = self.card, rank_and_world_size(self)
        order = self._order()
        length = len(order) // (self.batch_size * world_size)
        if not length:
            raise TrajectoryError(
                f"{self.source}: {len(order)} training windows do not fill {world_size} batches of {self.batch_size}"
            )
        reader = WindowReader(self._shards, order, self.window, self.on_corrupt, self.guidance())
        facts: dict[str, int | str] = {
            "set": card.digest,
            "batch_size over all ranks": self.batch_size * world_size,
            "shuffle_shards": self.shuffle_shards,
            "validation_shards": self.validation_shards,
        }
        return EpochLoader(
            _Training(reader, self.batch_size, rank, world_size),
            length,
            partial(epoch_of, self),
            self.layout(**facts),
            self.num_workers,
            self.trainer.strategy.root_device if self.trainer else None,
        )

    def first_targets(self, epoch: int, number: int) -> list[list[int]] | None:
        """Step of the first target of each window of training batch ``number`` of ``epoch``, rank by rank.

        None with ``on_corrupt: skip``, where others may replace damaged ones.
        """
        if self.on_corrupt == "skip":
            return None
        order, world_size = self._order(), rank_and_world_size(self)[1]
        firsts = (self.batch_size * (number * world_size + rank) for rank in range(world_size))
        return [order.first_targets(epoch, range(first, first + self.batch_size)) for first in firsts]

    def _order(self) -> Order:
        shards = self.card.num_shards - self.validation_shards
        return self.order_of(shards, self.card.samples_per_shard, self.shuffle_shards)

    def val_dataloader(self) -> EpochLoader[Trajectories]:
        """Batches of whole :class:`Trajectories`, each on exactly one rank; the last may be smaller."""
        card, (rank, world_size) = self.card, rank_and_world_size(self)
        first = (card.num_shards - self.validation_shards) * card.samples_per_shard
        ids = range(first + rank, card.num_samples, world_size)
        batches = _Validation(self._shards, ids, self.validation_batch_size, self.on_corrupt)
        most = len(range(first, card.num_samples, world_size))  # Lightning skips a rank whose length is 0
        return EpochLoader(batches, -(-most // self.validation_batch_size), num_workers=min(1, self.num_workers))

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Count the transitions that replace damaged ones."""
        if isinstance(batch, EncodedTransition):
            self.num_replaced += sum(batch.replaced)
        return batch

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Decode features on the device, so that int8 transfers a quarter of the bytes."""
        return batch.decode() if isinstance(batch, EncodedTransition) else batch

    def teardown(self, stage: str) -> None:
        """Stop fetching shards ahead; log how many transitions replaced damaged ones."""
        if (shards := self.__dict__.pop("_shards", None)) is not None:
            shards.close()
        if self.num_replaced:
            _log.warning("%s: %d damaged training transitions were replaced by others", self.source, self.num_replaced)
