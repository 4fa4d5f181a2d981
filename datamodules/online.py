"""Trajectories drawn while the shortcut trains: the frozen base in place of a recorded set, nothing on disk."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import chain, islice
from typing import Literal

import lightning as L
import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn

from datamodules.conditions import InTurn, sample_seed
from datamodules.trajectories import EpochLoader
from lit_shortcut.contracts import Conditions, MaskedImageModel, Trajectories, Transition
from lit_shortcut.interface import TokenInterface
from lit_shortcut.sampling import Decoding
from lit_shortcut.tasks.generation import record
from lit_shortcut.trajectory import DTYPES, FORMAT_VERSION, Card, Trajectory, collate, transitions


class OnlineDataModule(L.LightningDataModule):
    """Trains and validates on trajectories that the base draws when they are needed.

    Takes the place of :class:`~datamodules.trajectories.TrajectoryDataModule`: no disk, and no pair is seen twice, for
    one run of the decoding loop per G · (N − R) transitions.

    A pool of ``pool_images`` images is drawn by the vanilla loop, its windows are mixed and handed out once each, and
    the next pool takes its place. Batch n of an epoch follows from seed, epoch and n alone. Images of epoch 0 are those
    that ``predict`` records of ``conditions``; every later epoch has new ones. What does not fill a pool on each rank,
    or a batch in a pool, is left out.

    The base runs in the trainer's own process, on its device and in its precision, as under ``predict``; there are no
    workers. Training waits meanwhile: both want the same device, so that nothing would be won by letting them overlap.
    The pool itself lies in the host's memory, pool_images × G × (N − R) × (R + 1) × S × C × bytes per value: 1.4 GB for
    16 images of MaskGIT at 512×512 in bfloat16.

    Args:
        base: the frozen model.
        decoding: how its tokens are drawn.
        conditions: what to draw in an epoch, on all ranks together; its ``batch_size`` are drawn at once.
        validation: what to draw, batch by batch, for each validation, anew but always the same; its seed must be
            another one.
        batch_size: transitions per batch and rank.
        pool_images: images per rank whose transitions are mixed, a multiple of the images drawn at once.
        window: R, steps in a transition.
        dtype: of the features in the pool, as of a recorded set.
        seed: of the order.
    """

    source = "trajectories drawn online"

    def __init__(
        self,
        base: MaskedImageModel,
        decoding: Decoding,
        conditions: InTurn,
        validation: InTurn,
        batch_size: int = 64,
        *,
        pool_images: int = 64,
        window: int = 1,
        dtype: Literal["bfloat16", "float32"] = "bfloat16",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if validation.seed == conditions.seed:
            raise ValueError(f"validation would see images of the training: both have the seed {conditions.seed}")
        if not 1 <= window < decoding.num_steps:
            raise ValueError(f"window must lie in 1..{decoding.num_steps - 1}, below the number of steps; got {window}")
        if pool_images < 1 or pool_images % conditions.batch_size:
            raise ValueError(
                f"pool_images must be a multiple of {conditions.batch_size}, which are drawn at once; got {pool_images}"
            )
        branches = 1 if decoding.guidance == 0 else 2
        windows = pool_images * branches * (decoding.num_steps - window)
        if not 1 <= batch_size <= windows:
            raise ValueError(f"batch_size must lie in 1..{windows}, the transitions in a pool; got {batch_size}")
        assert isinstance(base, nn.Module)
        self.base: MaskedImageModel = base
        self.decoding, self.conditions, self.validation = decoding, conditions, validation
        self.batch_size, self.pool_images, self.window, self.seed = batch_size, pool_images, window, seed
        self.branches, self.batches_per_pool = branches, windows // batch_size
        self.dtype = dtype

    @property
    def card(self) -> Card:
        """What a recorded set of an epoch's images would say of itself."""
        return Card(
            format_version=FORMAT_VERSION,
            base_fingerprint=self.base.fingerprint,
            spec=self.base.spec._asdict(),
            decoding=asdict(self.decoding),
            branches=self.branches,
            num_steps=self.decoding.num_steps,
            dtype=self.dtype,
            num_samples=self.conditions.num_images,
            samples_per_shard=self.conditions.batch_size,
            seed=self.conditions.seed,
            num_classes=self.conditions.num_classes,
            prompts=self.conditions.prompts_sha256,
        )

    @property
    def interface(self) -> TokenInterface:
        """The cheap ends of the base."""
        return self.base.interface

    def velocity_scale(self) -> Tensor:
        """Standard deviation (C,) of the features' change in a step, at places still masked, over the first pool."""
        return velocity_scale(self._pool(epoch=0, number=0))

    def train_dataloader(self) -> EpochLoader:
        """Batches of :class:`Transition`, images and steps mixed, of new images each epoch.

        Raises:
            ValueError: if the images of an epoch do not fill a pool on each rank.
        """
        world_size = self._ranks()[1]
        pools = self.conditions.num_images // (self.pool_images * world_size)
        if not pools:
            raise ValueError(
                f"{self.conditions.num_images} images an epoch do not fill {world_size} pools of {self.pool_images}"
            )
        layout = {
            "world_size": world_size,
            "batch_size": self.batch_size,
            "pool_images": self.pool_images,
            "images_at_once": self.conditions.batch_size,
            "images_an_epoch": self.conditions.num_images,
            "window": self.window,
            "seed": self.seed,
        }
        return EpochLoader(
            lambda epoch: chain.from_iterable(self._batches(epoch, number) for number in range(pools)),
            lambda: self.trainer.current_epoch if self.trainer else 0,
            pools * self.batches_per_pool,
            layout,
        )

    def val_dataloader(self) -> Drawn:
        """Batches of whole :class:`Trajectories`, each on one rank exactly; the last may be smaller."""
        rank, world_size = self._ranks()
        return Drawn(lambda: map(self.draw, islice(self.validation.loader(), rank, None, world_size)))

    def draw(self, conditions: Conditions) -> Trajectories:
        """Trajectories of ``conditions`` as recorded, in the host's memory."""
        assert isinstance(self.base, nn.Module)
        device, precision = torch.device("cpu"), None
        if self.trainer:
            device, precision = self.trainer.strategy.root_device, self.trainer.precision_plugin
            precision.convert_module(self.base)
        self.base.to(device)
        with precision.predict_step_context() if precision else nullcontext():
            drawn = record(self.base, move_data_to_device(conditions, device), self.decoding)
        drawn = drawn._replace(features=drawn.features.to(DTYPES[self.dtype]))
        return move_data_to_device(drawn, torch.device("cpu"))

    def _batches(self, epoch: int, number: int) -> Iterator[Transition]:
        """Those of this rank's pool ``number`` in ``epoch``."""
        windows = [window for one in self._pool(epoch, number) for window in transitions(one, self.window)]
        random.Random(f"{self.seed}:{epoch}:{number}").shuffle(windows)  # noqa: S311 - an order, no secret
        for index in range(self.batches_per_pool):
            yield collate(windows[index * self.batch_size : (index + 1) * self.batch_size])

    def _pool(self, epoch: int, number: int) -> Iterator[Trajectory]:
        """This rank's pool ``number`` in ``epoch``."""
        rank, world_size = self._ranks()
        run_seed = self.conditions.seed if epoch == 0 else sample_seed(self.conditions.seed, -epoch)
        together = self.pool_images // self.conditions.batch_size * world_size
        conditions = islice(
            self.conditions.loader(run_seed), number * together + rank, (number + 1) * together, world_size
        )
        return chain.from_iterable(unstack(self.draw(batch)) for batch in conditions)

    def _ranks(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)


@dataclass(frozen=True)
class Drawn:
    """Batches made anew each time they are gone through."""

    batches: Callable[[], Iterator[Trajectories]]

    def __iter__(self) -> Iterator[Trajectories]:
        return self.batches()


def unstack(batch: Trajectories) -> Iterator[Trajectory]:
    """Each row of ``batch`` by itself, without the rows that pad its features to the longest: undoes ``stack``."""
    conditions, text = batch.conditions, batch.text
    for row, (number, seed, label) in enumerate(zip(*(part.tolist() for part in conditions[:3]), strict=True)):
        one = Trajectory(
            number, seed, label, batch.features[row], batch.tokens[row].int(), batch.committed_at[row].short()
        )
        if text is not None:
            lengths = text.lengths[row].int()
            padding = text.control.shape[-2] - int(lengths.max())
            one = one._replace(
                features=one.features[:, :, : one.features.shape[2] - padding],
                prompt=conditions.prompts[row],
                text_lengths=lengths,
                text_control=text.control[row, 0, : int(text.num_control[row, 0])],
            )
        yield one


def velocity_scale(trajectories: Iterable[Trajectory]) -> Tensor:
    """Standard deviation (C,) of the features' change in a step, at places still masked; 1 where nothing changes."""
    total = squares = torch.zeros((), dtype=torch.float64)
    rows = 0
    for one in trajectories:
        velocity = one.features.float().diff(dim=1)[:, :, : len(one.tokens)]
        is_masked = one.committed_at > torch.arange(velocity.shape[1])[:, None]
        counted = velocity[:, is_masked].flatten(0, -2).double()
        total, squares, rows = total + counted.sum(0), squares + counted.square().sum(0), rows + len(counted)
    scale = (squares / rows - (total / rows).square()).clamp(min=0).sqrt().float()
    return scale.where(scale > 0, 1)  # a channel that never changes has no error to scale
