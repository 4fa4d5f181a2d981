"""Record what predict generates: a shard per batch, written in the background, gone on with after an interruption."""

from __future__ import annotations

import logging
import shutil
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, cast

import lightning as L
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info

from lit_shortcut.contracts import MaskedImageModel, Trajectories
from lit_shortcut.sampling import Decoding
from lit_shortcut.tasks.recording import Asked, card_of
from lit_shortcut.trajectory import (
    Card,
    Dtype,
    TrajectoryError,
    finished_shards,
    is_complete,
    recorded_bytes,
    remove_leftovers,
    remove_shards,
    save_interface,
    write_shard,
)

_GB = 1e9
_log = logging.getLogger(__name__)


class Recording(Protocol):
    """What the LightningModule has: its ``predict_step`` returns :class:`Trajectories` of ``base``."""

    base: MaskedImageModel
    decoding: Decoding


class Recorded(Asked, Protocol):
    """What the data module has: batches of conditions, of which those ``finished`` are left out."""

    finished: set[int]


class Background:
    """Runs jobs one after the other in a thread of its own, of which at most ``limit`` wait or run at a time."""

    def __init__(self, limit: int) -> None:
        self._limit, self._jobs, self._thread = limit, deque[Future[None]](), ThreadPoolExecutor(1)

    def submit(self, job: Callable[..., None], *arguments: Any) -> None:
        """Have ``job`` run; wait where as many as allowed are before it. Raises what an earlier job raised."""
        while self._jobs and (self._jobs[0].done() or len(self._jobs) >= self._limit):
            self._jobs.popleft().result()
        self._jobs.append(self._thread.submit(job, *arguments))

    def finish(self) -> None:
        """Wait for all jobs. Raises what the first that failed raised."""
        self._thread.shutdown()
        while self._jobs:
            self._jobs.popleft().result()


class TrajectoryWriter(BasePredictionWriter):
    """Write each predicted batch as one shard of a set of trajectories.

    Shards are encoded and written while the next batch is generated. An error in it ends the run at the next batch, or
    at the end; what was generated before is written all the same.

    Interrupted and started again, predict generates the missing shards alone; their bytes are the same as without the
    interruption.

    Args:
        folder: of the set.
        dtype: of the recorded features: ``bfloat16``, ``float16``, ``float32``, or ``int8`` with a scale for each row.
        overwrite: record anew where ``folder`` holds a complete set, or another one; its shards are deleted first.
        waiting: batches that are kept until they are written; more make generation wait. Their features lie where they
            were recorded: in memory, or in scratch files, which then take as much of the disk and none of memory.
    """

    def __init__(self, folder: Path, dtype: Dtype = "bfloat16", overwrite: bool = False, waiting: int = 2) -> None:
        super().__init__("batch")
        if waiting < 1:
            raise ValueError(f"waiting must be at least 1, got {waiting}")
        self.folder, self.dtype, self.overwrite, self.waiting = Path(folder), dtype, overwrite, waiting
        self.is_recording = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Write card and interface, and tell the data module which shards are there.

        Raises:
            TrajectoryError: if the folder holds another set, or the disk too little space.
        """
        super().setup(trainer, pl_module, stage)
        if stage != "predict":
            return
        datamodule = getattr(trainer, "datamodule", None)
        if datamodule is None:
            raise TrajectoryError(
                "recording needs a data module of conditions, such as datamodules.conditions.ClassLabels"
            )
        trainer.predict_loop.return_predictions = False  # the whole set would be kept in memory
        module, data = cast(Recording, pl_module), cast(Recorded, datamodule)
        self.card = card_of(module.base, module.decoding, data, self.dtype)
        anew = self._is_anew()
        trainer.strategy.barrier("looked at the set")  # before the first rank may delete what others look at
        if trainer.is_global_zero:
            self._prepare(module.base, anew)
        data.finished = trainer.strategy.broadcast(finished_shards(self.folder, self.card))
        self.is_recording = len(data.finished) < self.card.num_shards
        if not self.is_recording:  # Lightning warns of an empty loader, but not of none
            self.limit, trainer.limit_predict_batches = trainer.limit_predict_batches, 0
            return
        self.background = Background(self.waiting)

    def write_on_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        prediction: Trajectories,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Have the batch written as the shard that its first id belongs to."""
        index = int(prediction.conditions.ids[0]) // self.card.samples_per_shard
        self.background.submit(write_shard, self.folder, index, prediction, self.card)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Write what was generated before the run failed."""
        if self.is_recording:
            try:
                self.background.finish()
            except TrajectoryError as error:
                if error is not exception:
                    _log.warning("%s", error)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Say what is recorded. Not at ``on_predict_end``, which a rank without batches never reaches."""
        if stage != "predict":
            return
        if not self.is_recording:
            trainer.limit_predict_batches = self.limit
            return
        self.background.finish()
        trainer.strategy.barrier("shards written")
        if trainer.is_global_zero:
            finished = finished_shards(self.folder, self.card)
            samples = sum(len(self.card.ids(index)) for index in finished)
            size = recorded_bytes(self.folder, self.card) / _GB
            rank_zero_info(f"{self.folder}: {samples} of {self.card.num_samples} trajectories, {size:.3g} GB")

    def _is_anew(self) -> bool:
        """Whether what lies in the folder is to be replaced."""
        if not (self.folder / "card.json").exists():
            if any(self.folder.glob("shard-*")) and not self.overwrite:
                raise TrajectoryError(f"{self.folder}: holds shards without a card; overwrite: true deletes them")
            return self.overwrite
        if self.overwrite:
            try:
                is_same = Card.read(self.folder) == self.card
            except TrajectoryError:
                return True
            return not is_same or is_complete(self.folder, self.card)
        found, expected = asdict(Card.read(self.folder)), asdict(self.card)
        changes = [
            f"{name} is {found[name]}, not {expected[name]}" for name in expected if found[name] != expected[name]
        ]
        if changes and any(self.folder.glob("shard-*")):  # a card alone is left by a run that failed before its first
            raise TrajectoryError(
                f"{self.folder}: holds another set: {'; '.join(changes)}. Take another folder; "
                "overwrite: true deletes this set"
            )
        return False

    def _prepare(self, base: MaskedImageModel, anew: bool) -> None:
        remove_leftovers(self.folder)
        if anew:
            remove_shards(self.folder)
        finished = finished_shards(self.folder, self.card)
        if len(finished) == self.card.num_shards:
            rank_zero_info(
                f"{self.folder} is complete ({self.card.num_samples} trajectories); nothing to record; "
                "overwrite: true records it anew"
            )
            return
        missing = sum(len(self.card.ids(index)) for index in set(range(self.card.num_shards)) - finished)
        disk = next(path for path in (self.folder.absolute(), *self.folder.absolute().parents) if path.exists())
        needed, free = missing * self.card.sample_bytes / _GB, shutil.disk_usage(disk).free / _GB
        size = f"{missing} trajectories of {self.card.num_samples}, about {needed:.3g} GB"
        if needed > free:
            raise TrajectoryError(f"{self.folder}: {size} to record, but {free:.3g} GB free on the disk")
        rank_zero_info(f"{self.folder}: recording {size}; {free:.3g} GB free")
        self.card.write(self.folder)
        save_interface(self.folder, base.interface)
