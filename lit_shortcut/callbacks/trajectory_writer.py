"""Record what predict generates: a shard per batch, written in the background, gone on with after an interruption."""

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
from lit_shortcut.files import exclusive
from lit_shortcut.sampling import Decoding
from lit_shortcut.tasks.recording import Asked, card_of
from lit_shortcut.trajectory import (
    ENCODINGS,
    Card,
    TrajectoryError,
    finished_shards,
    save_interface,
    write_shard,
)
from lit_shortcut.trials import is_trial, report_trial
from lit_shortcut.weights import require_writable

_GB = 1e9
_log = logging.getLogger(__name__)


class Recording(Protocol):
    """What the LightningModule has: its ``predict_step`` returns the future of :class:`Trajectories` of ``base``."""

    base: MaskedImageModel
    decoding: Decoding


class TrajectoryWriter(BasePredictionWriter):
    """Write each predicted batch as one shard of a set of trajectories.

    Shards are encoded and written while the next batches are generated. An error in it ends the run at most ``waiting``
    batches later, or at the end; what was generated before is written all the same.

    Interrupted and started again, predict generates only the missing shards; their bytes are the same as without the
    interruption. While it records, a second predict into the same folder is refused. The data module asks for
    ``finished``, the batches whose shards are there already, and leaves them out.

    A trial run (``fast_dev_run``, ``limit_predict_batches``) writes its shards to a temporary folder.

    Args:
        folder: of the set.
        encoding: of the recorded features: ``bfloat16``, ``float16``, ``float32``, or ``int8`` with a scale for each
            row; or one registered with :func:`lit_shortcut.trajectory.register`.
        overwrite: record again where ``folder`` holds a complete set, or another one; its shards are deleted first.
        waiting: batches that are kept until they are written; more make generation wait. With the one that is
            generated they take ``waiting`` + 1 times the ``memory_limit_gb`` of the recording task at most; those in
            scratch files take as much of the disk and none of memory.
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
        """Look at what is finished, and write card and interface.

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
            self._shards, self.jobs = Path(self._held.enter_context(TemporaryDirectory())), Background()
            report_trial(self.folder)
            return
        if trainer.is_global_zero:
            require_writable(self.folder)
            self._hold()
        replace = self._is_replaced()
        trainer.strategy.barrier("looked at the set")  # before the first rank may delete what others look at
        if trainer.is_global_zero:
            self._prepare(module.base, replace)
        self.finished = trainer.strategy.broadcast(set(finished_shards(self.folder, self.card)))
        if len(self.finished) < self.card.num_shards:
            self.jobs = Background()

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
        """Queue the batch as the shard of its number; wait where ``waiting`` batches are before it."""
        assert self.jobs is not None
        assert batch_indices is not None
        (index,) = batch_indices
        deque(self.jobs.results(leave=self.waiting - 1), maxlen=0)
        self.jobs.submit(_write, self._shards, index, prediction, self.card)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Write what was generated before the run failed."""
        try:
            if self.jobs is not None:
                _log.warning("%s: finished shards remain valid; the same command goes on with the others", self.folder)
            self._finish()
        except (TrajectoryError, OSError) as error:
            if error is not exception:
                _log.warning("%s", error)
        finally:
            self._held.close()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Log what is recorded. Not at ``on_predict_end``, which a rank without batches never reaches."""
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
        """Write all shards that wait."""
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
                f"{self.folder}: another predict is recording into it; wait for its end or take another folder"
            ) from error
        except OSError as error:
            _log.warning("%s: cannot be locked (%s); start no second predict into it", self.folder, error)

    def _is_replaced(self) -> bool:
        """Whether what lies in the folder is to be deleted first."""
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
        before, after = _flat(asdict(found)), _flat(asdict(self.card))
        changes = [
            f"{name} is {before.get(name)}, not {after.get(name)}"
            for name in dict.fromkeys([*after, *before])
            if before.get(name) != after.get(name)
        ]
        if changes and any(self.folder.glob("shard-*")):  # only a card is left by a run that failed before its first
            raise TrajectoryError(
                f"{self.folder}: holds another set: {'; '.join(changes)}. Take another folder; "
                "overwrite: true deletes this set"
            )
        return False

    def _prepare(self, base: MaskedImageModel, replace: bool) -> None:
        """Delete leftovers, and the set if it is to be replaced; check the disk; write card and interface."""
        leftovers = [*self.folder.glob(".*.*"), *(self.folder.glob("shard-*") if replace else ())]
        for path in leftovers:
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
            raise TrajectoryError(f"{self.folder}: {size} to record, but {free:.3g} GB free on the disk")
        rank_zero_info(f"{self.folder}: recording {size}; {free:.3g} GB free")
        self.card.write(self.folder)
        save_interface(self.folder, base.interface)


def _write(folder: Path, index: int, recorded: Future[Trajectories], card: Card) -> None:
    write_shard(folder, index, recorded.result(), card)


def _flat(facts: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """``facts`` without nesting: ``base.fingerprint`` for what ``base`` holds under ``fingerprint``."""
    flat: dict[str, Any] = {}
    for name, value in facts.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
