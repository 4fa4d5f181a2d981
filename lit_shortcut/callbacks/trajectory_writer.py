"""Record what predict generates: one shard per batch, written in the background; interrupted runs resume."""

from __future__ import annotations

import logging
import shutil
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol, cast

import lightning as L
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info

from lit_shortcut.background import Background
from lit_shortcut.bounds import require_at_least
from lit_shortcut.contracts import MaskedImageModel, Trajectories
from lit_shortcut.evaluation.identity import differences
from lit_shortcut.files import AccessError, exclusive
from lit_shortcut.sampling import Decoding
from lit_shortcut.tasks.recording import Asked, card_of
from lit_shortcut.trajectory import ENCODINGS, Card, TrajectoryError, write_shard
from lit_shortcut.trajectory.index import finished_shards
from lit_shortcut.trajectory.interface_file import save_interface
from lit_shortcut.trials import is_trial, report_trial
from lit_shortcut.weights import require_writable

_GB = 1e9
_log = logging.getLogger(__name__)


class Recording(Protocol):
    """A LightningModule whose ``predict_step`` returns a future of :class:`Trajectories` of ``base``."""

    base: MaskedImageModel
    decoding: Decoding


class TrajectoryWriter(BasePredictionWriter):
    """Write each predicted batch as one shard of a set of trajectories.

    Shards are encoded and written while the next batches are generated. An error while writing ends the run at most
    ``waiting`` batches later, or at the end; what was generated before it is still written.

    Restarted after an interruption, predict generates only the missing shards, byte for byte the same as without the
    interruption. While one predict records, a second one into the same folder is refused. The data module leaves out
    the batches in ``finished``, whose shards exist already.

    A trial run (``fast_dev_run``, ``limit_predict_batches``) writes its shards to a temporary folder.

    Args:
        folder: folder of the set.
        encoding: how features are stored: ``bfloat16``, ``float16``, ``float32``, or ``int8`` with a scale for each
            row; or one registered with :func:`lit_shortcut.trajectory.register`.
        overwrite: record again if ``folder`` holds a complete set, or a different one; its shards are deleted first.
        waiting: batches that may wait to be written before generation pauses. Each is written by a thread of its own,
            since a GPU computes features faster than one thread writes them. Together with the one being generated they
            take at most ``waiting`` + 1 times the ``memory_limit_gb`` of the recording task; those in scratch files
            take as much space on the disk and no memory.
    """

    def __init__(self, folder: Path, encoding: str = "bfloat16", overwrite: bool = False, waiting: int = 2) -> None:
        super().__init__("batch")
        require_at_least(1, waiting=waiting)
        if encoding not in ENCODINGS:
            raise ValueError(f"encoding must be one of {', '.join(ENCODINGS)}, got {encoding}")
        self.folder, self.encoding, self.overwrite, self.waiting = Path(folder), encoding, overwrite, waiting
        self.finished: set[int] = set()
        self.jobs: Background[None] | None = None
        self._held = ExitStack()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find the finished shards, and write card and interface.

        Raises:
            TrajectoryError: if the folder holds another set, another predict records into it, or the disk has too
                little space.
            OSError: if the folder cannot be written.
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
        module, data = cast(Recording, pl_module), cast(Asked, datamodule)
        self.card = card_of(
            module.base,
            module.decoding,
            data,
            encoding=self.encoding,
            precision=str(trainer.precision),
            base_identity=module.base.identity(),
        )
        self.finished, self._shards = set(), self.folder
        if is_trial(trainer, "predict"):
            self._shards, self.jobs = Path(self._held.enter_context(TemporaryDirectory())), Background(self.waiting)
            report_trial(self.folder)
            return
        if trainer.is_global_zero:
            require_writable(self.folder)
            self._hold()
        replace = self._is_replaced()
        trainer.strategy.barrier("looked at the set")  # only then may the first rank delete anything
        if trainer.is_global_zero:
            self._prepare(module.base, replace)
        found = set(finished_shards(self.folder, self.card)) if trainer.is_global_zero else set[int]()
        self.finished = trainer.strategy.broadcast(found)  # other ranks may see shards that are just being deleted
        if len(self.finished) < self.card.num_shards:
            self.jobs = Background(self.waiting)

    def write_on_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        prediction: Future[Trajectories],
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Queue the batch as the shard of its number; wait if ``waiting`` batches are ahead of it."""
        assert self.jobs is not None
        assert batch_indices is not None
        (index,) = batch_indices
        deque(self.jobs.results(leave=self.waiting - 1), maxlen=0)
        self.jobs.submit(_write, self._shards, index, prediction, self.card)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Write what was generated before the run failed."""
        try:
            if self.jobs is not None:
                _log.warning("%s: finished shards remain valid; the same command resumes with the others", self.folder)
            self._finish()
        except (TrajectoryError, OSError) as error:
            if error is not exception:
                _log.warning("%s", error)
        finally:
            self._held.close()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Log what was recorded; not in ``on_predict_end``, which a rank without batches never reaches."""
        if stage != "predict":
            return
        with self._held:
            if self.jobs is None:
                return
            self._finish()
            if is_trial(trainer, "predict"):
                return
            trainer.strategy.barrier("shards written")
            if trainer.is_global_zero:
                finished = finished_shards(self.folder, self.card)
                samples, size = sum(len(self.card.ids(index)) for index in finished), sum(finished.values()) / _GB
                rank_zero_info(f"{self.folder}: {samples} of {self.card.num_samples} trajectories, {size:.3g} GB")

    def _finish(self) -> None:
        """Write all shards in the queue."""
        jobs, self.jobs = self.jobs, None
        if jobs is not None:
            try:
                deque(jobs.results(), maxlen=0)
            finally:
                jobs.close()

    def _hold(self) -> None:
        try:
            self._held.enter_context(exclusive(self.folder, wait=False))
        except BlockingIOError as error:
            raise TrajectoryError(
                f"{self.folder}: another predict is recording into it; wait until it ends or use another folder"
            ) from error
        except AccessError as error:
            _log.warning("%s; do not start a second predict into it", error)

    def _is_replaced(self) -> bool:
        """Return whether the contents of the folder are to be deleted first."""
        if not (self.folder / "card.json").exists():
            if any(self.folder.glob("shard-*")) and not self.overwrite:
                raise TrajectoryError(f"{self.folder}: holds shards without a card; overwrite: true deletes them")
            return self.overwrite
        try:
            found = Card.read(self.folder)
        except TrajectoryError:
            if self.overwrite:
                return True
            raise
        if self.overwrite:
            return found != self.card or len(finished_shards(self.folder, self.card)) == self.card.num_shards
        changes = differences(asdict(found), asdict(self.card))
        if changes and any(self.folder.glob("shard-*")):  # a run that failed before its first shard leaves only a card
            raise TrajectoryError(
                f"{self.folder}: holds another set: {'; '.join(changes)}. Take another folder; "
                "overwrite: true deletes this set"
            )
        return False

    def _prepare(self, base: MaskedImageModel, replace: bool) -> None:
        """Delete leftovers, and the set if it is to be replaced; check the disk; write card and interface."""
        begun = [".shard-*", ".card.json.*", ".interface.safetensors.*"]  # by a run that was killed
        for pattern in [*begun, "shard-*"] if replace else begun:
            for path in self.folder.glob(pattern):
                path.unlink()
        finished = finished_shards(self.folder, self.card)
        if len(finished) == self.card.num_shards:
            rank_zero_info(
                f"{self.folder} is complete ({self.card.num_samples} trajectories); nothing to record; "
                "overwrite: true records it again"
            )
            return
        missing = self.card.num_samples - sum(len(self.card.ids(index)) for index in finished)
        needed, free = missing * self.card.sample_bytes / _GB, shutil.disk_usage(self.folder).free / _GB
        size = f"{missing} trajectories of {self.card.num_samples}, about {needed:.3g} GB"
        if needed > free:
            raise TrajectoryError(f"{self.folder}: {size} to record, but only {free:.3g} GB free on the disk")
        rank_zero_info(f"{self.folder}: recording {size}; {free:.3g} GB free")
        self.card.write(self.folder)
        save_interface(self.folder, base.interface)


def _write(folder: Path, index: int, recorded: Future[Trajectories], card: Card) -> None:
    write_shard(folder, index, recorded.result(), card)
