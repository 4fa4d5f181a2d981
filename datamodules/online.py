"""Trajectories generated during training by the frozen base, without a recorded set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Any, Literal

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import nn
from torch.utils.data import Dataset

from datamodules.conditions import InTurn, sample_seed
from datamodules.loading import EpochLoader, epoch_of
from datamodules.ranks import rank_and_world_size
from datamodules.transitions import TransitionDataModule
from datamodules.windows import Order, require_spans, spans
from lit_shortcut.acceleration.accelerated import Accelerated, Vanilla
from lit_shortcut.acceleration.plans import Even
from lit_shortcut.acceleration.shortcut import Shortcut
from lit_shortcut.bounds import require_at_least, require_in_steps
from lit_shortcut.contracts import Acceleration, Conditions, MaskedImageModel, Trajectories, Transition
from lit_shortcut.interface import TokenInterface
from lit_shortcut.precision import sampling_precision
from lit_shortcut.sampling import Decoding
from lit_shortcut.tasks.recording import card_of, record
from lit_shortcut.tasks.shortcut import ShortcutTask
from lit_shortcut.trajectory import Card, TrajectoryError
from lit_shortcut.trajectory.encoding import require_finite
from lit_shortcut.trajectory.transitions import concatenated, select

_VANILLA = Vanilla()


@dataclass(eq=False)
class _Training(Dataset[Transition]):
    """One rank's batches by (epoch, number); its pools are every ``world_size``-th."""

    pool: Callable[[int, int], Trajectories]
    order: Order
    batch_size: int
    window: int
    guidance: Sequence[float] | None
    rank: int
    world_size: int

    def __getitem__(self, index: tuple[int, int]) -> Transition:
        epoch, number = index
        windows = [self.order.at(epoch, position) for position in self.positions(number, self.rank)]
        places, gaps = [window[1:4] for window in windows], [window.gap for window in windows]
        return select(self.pool(epoch, windows[0].shard), places, self.window, gaps, self.guidance)

    def positions(self, number: int, rank: int) -> range:
        """Positions in the order of the windows in batch ``number`` of ``rank``."""
        own, number = divmod(number, self.per_pool)
        first = (own * self.world_size + rank) * len(self.order) // self.order.num_shards
        first += number * self.batch_size
        return range(first, first + self.batch_size)

    @property
    def per_pool(self) -> int:
        """Number of batches that a pool fills."""
        return len(self.order) // self.order.num_shards // self.batch_size

    def __len__(self) -> int:
        return self.order.num_shards // self.world_size * self.per_pool


@dataclass(eq=False)
class _Validation(Dataset[Trajectories | None]):
    """One rank's batches by (epoch, number); None after its last."""

    draw: Callable[[Conditions], Trajectories]
    conditions: Dataset[Conditions]
    count: int
    rank: int
    world_size: int

    def __getitem__(self, index: tuple[int, int]) -> Trajectories | None:
        number = index[1] * self.world_size + self.rank
        return self.draw(self.conditions[number]) if number < self.count else None


class OnlineDataModule(TransitionDataModule):
    """Training and validation on trajectories that the base generates on demand.

    Replaces :class:`~datamodules.trajectories.TrajectoryDataModule`: it needs no disk and never repeats a pair, at the
    cost of one run of the decoding loop per G · (N − R) transitions.

    Images are generated in pools of ``pool_images``; the windows of a pool are shuffled and used once each before the
    next pool replaces it. Ranks take pools in turn. Batch n of an epoch depends only on seed, epoch and n, so a resumed
    run generates only the pool it stopped in again. Epoch 0 has the images that ``predict`` records of ``conditions``;
    every later epoch has new ones. Images that do not fill a pool, and windows that do not fill a batch, are dropped.

    The base runs in the trainer's process, on its device, in the precision that it is recorded and tested in:
    ``bf16-true`` where training is in ``bf16-mixed``. Training waits meanwhile: both need the same device, so
    overlapping them would gain nothing. The pool takes pool_images × G × N × S
    × C × bytes per value, 0.8 GB for 16 images of MaskGIT at 512×512 in bfloat16, and twice that while the next one is
    generated. If it fits within ``device_memory_gb``, features stay on the device and batches are made there; otherwise
    they are kept in the host's memory.

    With ``on_policy_budget`` the network in training draws the tokens of each training pool, as it is when the pool is
    generated, and transitions are made of the base's features on those tokens: it learns from tokens that it will meet.
    The base runs at every step either way, so this costs only the network's own passes. A run resumed within a pool
    draws it again with the weights it stopped with, so its batches are then others.

    Args:
        base: the frozen model.
        decoding: settings that tokens are drawn with.
        conditions: conditions of an epoch, for all ranks together; ``batch_size`` images are generated at once.
        validation: conditions of each validation, the same every time; needs another seed.
        batch_size: transitions per batch and rank.
        pool_images: images whose transitions are mixed, a multiple of the images generated at once.
        window: R, consecutive steps that a transition has as targets.
        max_gap: largest number of steps from the features of a transition to its target, for anchored networks; above
            1, ``window`` is 1.
        guided: transitions are of the guided features, for guided networks.
        dtype: dtype of the features in the pool.
        device_memory_gb: GB (10⁹ bytes) that pools may take on the device; a pool stays there if two fit,
            never at 0.
        on_policy_budget: b, full steps of the runs that the network in training draws tokens in, evenly spaced; None
            lets the base draw them all. Validation is always on the base's own tokens.
        seed: seed of the order.

    Raises:
        ValueError: if sizes do not fit one another, or validation has the seed of training.
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
        max_gap: int = 1,
        guided: bool = False,
        dtype: Literal["bfloat16", "float32"] = "bfloat16",
        device_memory_gb: float = 4.0,
        on_policy_budget: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if validation.seed == conditions.seed:
            raise ValueError(f"validation.seed must differ from conditions.seed, both are {conditions.seed}")
        require_spans(decoding.num_steps, window=window, max_gap=max_gap)
        if pool_images < 1 or pool_images % conditions.batch_size:
            raise ValueError(
                f"pool_images must be a multiple of conditions.batch_size, {conditions.batch_size}; got {pool_images}"
            )
        if guided and not decoding.is_guided:
            raise ValueError("guided must be false where decoding has no guidance; got true")
        windows = pool_images * (1 if guided else decoding.branches) * len(spans(decoding.num_steps - window, max_gap))
        if not 1 <= batch_size <= windows:
            raise ValueError(f"batch_size must lie in 1..{windows}, the transitions in a pool; got {batch_size}")
        assert isinstance(base, nn.Module)
        self.base: MaskedImageModel = base
        self.decoding, self.conditions, self.validation = decoding, conditions, validation
        self.batch_size, self.pool_images, self.seed = batch_size, pool_images, seed
        self.window, self.max_gap, self.guided = window, max_gap, guided
        require_at_least(0, device_memory_gb=device_memory_gb)
        if on_policy_budget is not None:
            require_in_steps(decoding.num_steps, on_policy_budget=on_policy_budget)
        self.dtype, self.device_memory_gb, self.on_policy_budget = dtype, device_memory_gb, on_policy_budget
        self._pool = lru_cache(maxsize=1)(self._draw_pool)

    @cached_property
    def card(self) -> Card:
        """Card that a recorded set of the images of epoch 0 would have."""
        return card_of(
            self.base,
            self.decoding,
            self.conditions,
            encoding=self.dtype,
            precision=str(sampling_precision(self.trainer).precision) if self.trainer else "32-true",
            base_identity=self.base.identity(),
        )

    @property
    def interface(self) -> TokenInterface:
        """The cheap ends of the base."""
        return self.base.interface

    def train_dataloader(self) -> EpochLoader[Transition]:
        """Batches of :class:`Transition`, with images and steps shuffled, of new images each epoch.

        Raises:
            ValueError: if the images of an epoch do not fill a pool on each rank, or what is trained is no shortcut and
                cannot draw on policy.
        """
        batches = self._training()
        self._policy()
        facts: dict[str, int | str] = {
            "images": self.card.digest,
            "world_size": batches.world_size,
            "batch_size": self.batch_size,
            "pool_images": self.pool_images,
        }
        if self.on_policy_budget is not None:
            facts["on_policy_budget"] = self.on_policy_budget
        return EpochLoader(batches, len(batches), partial(epoch_of, self), self.layout(**facts))

    def first_targets(self, epoch: int, number: int) -> list[list[int]]:
        """Step of the first target of each window of training batch ``number`` of ``epoch``, rank by rank."""
        batches = self._training()
        ranks = range(batches.world_size)
        return [batches.order.first_targets(epoch, batches.positions(number, rank)) for rank in ranks]

    def _training(self) -> _Training:
        rank, world_size = rank_and_world_size(self)
        pools = self.conditions.num_images // self.pool_images
        if pools < world_size:
            raise ValueError(
                f"{self.conditions.num_images} images an epoch do not fill {world_size} pools of {self.pool_images}"
            )
        order = self.order_of(pools, self.pool_images, group=1)
        return _Training(self._pool, order, self.batch_size, self.window, self.guidance(), rank, world_size)

    def val_dataloader(self) -> EpochLoader[Trajectories]:
        """Batches of whole :class:`Trajectories`, each on exactly one rank; the last may be smaller."""
        rank, world_size = rank_and_world_size(self)
        loader = self.validation.loader()
        batches = _Validation(self.draw, loader.dataset, len(loader), rank, world_size)
        return EpochLoader(batches, -(-len(loader) // world_size))

    def draw(self, conditions: Conditions, *, method: Acceleration = _VANILLA, stays: bool = False) -> Trajectories:
        """Generate trajectories of ``conditions`` in one batch, as ``predict`` does, and move them to the host.

        Args:
            conditions: conditions of one batch.
            method: what draws the tokens.
            stays: keep the features on the device.

        Raises:
            TrajectoryError: if features are not finite.
        """
        assert isinstance(self.base, nn.Module)
        device, precision = torch.device("cpu"), None
        if self.trainer:
            device, precision = self.trainer.strategy.root_device, sampling_precision(self.trainer)
            precision.convert_module(self.base)
        self.base.to(device)
        with precision.predict_step_context() if precision else nullcontext():
            conditions = move_data_to_device(conditions, device)
            drawn = record(self.base, conditions, self.decoding, method=method)
        features = drawn.features.to(getattr(torch, self.dtype))
        try:
            require_finite("features", features)
        except ValueError as error:
            raise TrajectoryError(f"{self.source}: {error}") from error
        others = drawn._replace(features=features.new_empty(0))
        return move_data_to_device(others, torch.device("cpu"))._replace(features=features if stays else features.cpu())

    def _draw_pool(self, epoch: int, number: int) -> Trajectories:
        """Generate pool ``number`` of ``epoch``."""
        self._pool.cache_clear()  # free the previous pool
        run_seed = self.conditions.seed if epoch == 0 else sample_seed(self.conditions.seed, -epoch)
        batches, at_once = self.conditions.loader(run_seed).dataset, self.pool_images // self.conditions.batch_size
        conditions = (batches[number * at_once + index] for index in range(at_once))
        method = self._policy()
        return concatenated([self.draw(batch, method=method, stays=self._pool_stays) for batch in conditions])

    def _policy(self) -> Acceleration:
        """Return what draws the tokens of a training pool."""
        if self.on_policy_budget is None:
            return _VANILLA
        module: Any = self.trainer and self.trainer.lightning_module
        if not isinstance(module, ShortcutTask):
            raise ValueError(f"on_policy_budget needs a ShortcutTask, whose network draws; got {type(module).__name__}")
        return Accelerated(Even(self.on_policy_budget), Shortcut(module.network))

    @property
    def _pool_stays(self) -> bool:
        """True if two pools fit on the device."""
        spec, itemsize = self.base.spec, getattr(torch, self.dtype).itemsize
        step = self.pool_images * self.decoding.branches * spec.sequence_length * spec.width * itemsize
        return 2 * step * self.decoding.num_steps <= self.device_memory_gb * 1e9
