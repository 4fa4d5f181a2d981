"""Measure generated images: ``test`` draws the rows of a table, measures each and times all."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from lit_shortcut.acceleration.accelerated import reads_features
from lit_shortcut.bounds import require_at_least
from lit_shortcut.contracts import Conditions, MaskedImageModel
from lit_shortcut.evaluation.drawing import Drawn, draw_row
from lit_shortcut.evaluation.identity import loop_identities, row_identity
from lit_shortcut.evaluation.originals import Originals
from lit_shortcut.evaluation.results import Results
from lit_shortcut.evaluation.rows import Row, vanilla_row
from lit_shortcut.evaluation.tally import Tally
from lit_shortcut.evaluation.timing import UNIT_PASSES, time_rows
from lit_shortcut.metrics.images import ImageMetric
from lit_shortcut.metrics.latency import device_name
from lit_shortcut.metrics.paired import are_paired
from lit_shortcut.tasks.comparison import ComparisonTask
from lit_shortcut.trials import is_trial, report_trial
from lit_shortcut.weights import require_writable


class EvaluationTask(ComparisonTask):
    """Vanilla and accelerated generation with a frozen base, side by side; nothing is trained.

    ``test`` draws each batch of conditions for every row that is not finished yet and feeds the row's metrics; after
    the last batch of a run seed it stores all rows. Metrics that compare an image with its original get those of
    vanilla at ``decoding.num_steps``. What was measured is kept batch by batch, so that a run that was
    stopped resumes where it was. Last, all rows' latencies are measured in turns, so that a change of the machine's
    speed meets all alike.

    Args:
        base: the frozen model.
        metrics: image metrics by the name they are logged under.
        results: folder for finished rows.
        latency_rounds: times each row is timed; 0 leaves latency out.
        latency_batch_size: images decoded at once when timing.
        grid_images: images kept of each row for side-by-side grids; 0 leaves grids out.
        **comparison: arguments of :class:`~lit_shortcut.tasks.comparison.ComparisonTask`. One of the rows is vanilla at
            ``decoding.num_steps``, which speed-ups refer to. With ``random_weights`` only latency is measured.

    Raises:
        ValueError: if a row is malformed or given twice, the reference is missing, or a number is too small; or if
            latency, all there is to random weights, is left out, too.
    """

    def __init__(
        self,
        base: MaskedImageModel,
        *,
        metrics: dict[str, ImageMetric] | None = None,
        results: Path = Path("runs/results"),
        latency_rounds: int = 5,
        latency_batch_size: int = 32,
        grid_images: int = 20,
        **comparison: Any,
    ) -> None:
        super().__init__(base, **comparison)
        require_at_least(0, latency_rounds=latency_rounds, grid_images=grid_images)
        require_at_least(1, latency_batch_size=latency_batch_size)
        if self.random_weights and not latency_rounds:
            raise ValueError("latency_rounds must be at least 1 for random weights, which have a latency only; got 0")
        self.metrics, self.results, self.grid_images = metrics or {}, results, grid_images
        self.latency_rounds, self.latency_batch_size = latency_rounds, latency_batch_size
        self.reference = vanilla_row(self.decoding)
        if self.reference.name not in (names := [row.name for row in self.rows]):
            raise ValueError(f"rows must hold {self.reference.name}, which speed-up refers to; got {names}")
        self.stored = Results(results)
        self.trial_folder: TemporaryDirectory[str] | None = None

    @property
    def run_seeds(self) -> list[int]:
        """Return the run seeds of each row."""
        return list(self.conditions.run_seeds)

    def setup(self, stage: str) -> None:
        """Check rows and conditions before anything is run.

        Raises:
            ValueError: if the base does not know a condition, or a row cannot be run.
            OSError: if the results' folder cannot be written.
        """
        super().setup(stage)
        _ = self.base.fingerprint  # of the weights as loaded: it is kept, and the trainer casts them after this
        if is_trial(self.trainer, "test"):
            self.trial_folder = TemporaryDirectory()
            self.stored = Results(Path(self.trial_folder.name))
            report_trial(self.results)
        else:
            self.stored, self.trial_folder = Results(self.results), None
            require_writable(self.results)

    def on_test_start(self) -> None:
        """Compile networks if ``compiled``, and find the finished rows."""
        super().on_test_start()
        self.loops = loop_identities(
            self.base,
            self.rows,
            precision=str(self.trainer.precision),
            compiled=self.compiled and self.compile_mode,
        )
        self.asked, vanilla = self._asked(), self.loops[self.reference.name]
        originals = vanilla if are_paired(self.metrics) else None
        by_batch = self.asked | {"batch_size": self.conditions.batch_size}
        self.identities = {
            row.name: row_identity(
                self.loops[row.name],
                by_batch if reads_features(row.acceleration) else self.asked,
                self.metrics,
                originals,
            )
            for row in self.rows
        }
        self.unfinished: dict[int, list[str]] = self.trainer.strategy.broadcast(self._unfinished())

    def test_step(self, batch: Conditions, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Draw one batch for every row that is not finished."""
        if dataloader_idx == 0 and batch_idx == 0:
            self.timed = batch.slice(0, self.latency_batch_size)
        seed = self.run_seeds[dataloader_idx]
        rows = [row for row in self.rows if row.name in self.unfinished[seed]]
        if batch_idx == 0:
            self.tallies = {row.name: self._tally(row, seed) for row in rows}
            self.originals = self._originals(seed)
        left = [row for row in rows if batch_idx >= self.tallies[row.name].batches]
        vanilla = self._vanilla(batch, batch_idx) if left and are_paired(self.metrics) else None
        for row in left:
            drawn = vanilla if vanilla and row.name == self.reference.name else draw_row(self.base, batch, row)
            is_shown = batch_idx == 0 and dataloader_idx == 0 and self.trainer.is_global_zero
            if is_shown and self.grid_images:
                count = self.grid_images
                self.stored.add_images(row, drawn.images[:count], batch.slice(0, count))
            self.tallies[row.name].add(drawn, batch, vanilla)
        if batch_idx == int(self.trainer.num_test_batches[dataloader_idx]) - 1:
            for row in rows:
                self._finish(row, seed)

    def on_test_epoch_end(self) -> None:
        """Measure latency, on the first conditions of the first run seed."""
        if not self.latency_rounds or not hasattr(self, "timed"):
            return
        identity = {
            "rows": self.loops,
            "rounds": self.latency_rounds,
            "unit_passes": UNIT_PASSES,
            "batch_size": len(self.timed.ids),
            "device": device_name(self.device),
        }
        if self.trainer.strategy.broadcast(self.stored.latency()["identity"] == identity):
            return
        with self.trainer.precision_plugin.forward_context():
            measured = time_rows(self.base, self.rows, self.decoding, self.timed, self.latency_rounds)
        if self.trainer.is_global_zero:
            self.stored.set_latency(identity, measured)

    def teardown(self, stage: str) -> None:
        """Delete the files of a trial run."""
        if self.trial_folder is not None:
            self.trial_folder.cleanup()

    def _asked(self) -> dict[str, Any]:
        """Return the identity of the conditions, with as many images as a trial run draws."""
        asked: dict[str, Any] = self.conditions.identity()
        if self.trial_folder is None:
            return asked
        drawn = int(self.trainer.num_test_batches[0]) * self.conditions.batch_size * self.trainer.world_size
        return asked | {"num_images": min(asked["num_images"], drawn)}

    def _unfinished(self) -> dict[int, list[str]]:
        """Return names of the rows to be drawn, by run seed."""
        seeds = self.run_seeds
        if self.random_weights:
            return {seed: [] for seed in seeds}
        left = {
            seed: [row.name for row in self.rows if self.stored.find(row, seed, self.identities[row.name]) is None]
            for seed in seeds
        }
        total, missing = len(seeds) * len(self.rows), sum(map(len, left.values()))
        if missing < total:
            rank_zero_info(f"{total - missing} of {total} rows are finished already")
        return left

    def _tally(self, row: Row, seed: int) -> Tally:
        path = self.stored.unfinished_path(row, seed, self.trainer.global_rank)
        key = self._batches(seed) | self.identities[row.name]
        return Tally(self.metrics, row.decoding.num_steps, self.device, path, key)

    def _originals(self, seed: int) -> Originals:
        folder = self.stored.originals_path(seed, self.trainer.global_rank)
        drawing = {"conditions": self.asked, "loop": self.loops[self.reference.name]}
        return Originals(folder, self._batches(seed) | drawing)

    def _vanilla(self, batch: Conditions, index: int) -> Drawn:
        """Return what vanilla draws of ``batch``, the ``index``-th, or drew of it before."""
        if (found := self.originals.find(index, self.base, self.device)) is not None:
            return found
        drawn = draw_row(self.base, batch, self.reference)
        self.originals.add(index, drawn)
        return drawn

    def _batches(self, seed: int) -> dict[str, Any]:
        """Return what decides which images are in a batch."""
        rank, world_size = self.trainer.global_rank, self.trainer.world_size
        return {"seed": seed, "rank": rank, "world_size": world_size, "batch_size": self.conditions.batch_size}

    def _finish(self, row: Row, seed: int) -> None:
        tally = self.tallies.pop(row.name)
        values, full_steps = tally.compute()
        if self.trainer.is_global_zero:
            self.stored.add(row, seed, self.identities[row.name], values, full_steps)
        self.trainer.strategy.barrier(f"{row.name} is stored")  # before a rank drops what it holds of the row
        tally.drop()
        shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        rank_zero_info(f"{row.name}, seed {seed}: {shown}, {full_steps['mean']:.4g} base passes")
