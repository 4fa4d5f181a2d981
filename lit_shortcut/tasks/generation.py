"""Generate with a frozen base: ``predict`` records trajectories, ``test`` measures images, row by row."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lit_shortcut.acceleration.compilation import Mode, compile_networks
from lit_shortcut.contracts import Conditions, MaskedImageModel, Trajectories
from lit_shortcut.decoding.schedules import tokens_per_step
from lit_shortcut.evaluation import (
    Results,
    Row,
    add_images,
    images_of,
    require_feasible,
    require_known,
    row_facts,
    take_values,
)
from lit_shortcut.metrics.images import ImageMetric
from lit_shortcut.metrics.latency import measure_latency, speedups
from lit_shortcut.sampling import Decoding, generate
from lit_shortcut.tasks.recording import SCRATCH, record
from lit_shortcut.weights import require_writable


class GenerationTask(L.LightningModule):
    """Vanilla and accelerated generation with a frozen base; nothing is trained.

    ``test`` goes through the run seeds, and for each through ``rows``, feeds every metric with the images, and stores
    each finished row; rows found finished are not run again. Last, all rows' latencies are measured in turns in one
    go, so that a change of the machine's speed meets all alike. Latency is that of the decoding loop alone, without
    the image decoder, synchronised, after a warm-up.

    Args:
        base: the frozen model.
        decoding: how tokens are drawn; its ``num_steps`` is used by ``predict`` and is the reference of the speed-up.
        rows: ways to decode that ``test`` compares; one of them is vanilla at ``decoding.num_steps``.
        metrics: measures of images by the name they are logged under.
        results: folder for finished rows.
        run_seeds: ``test`` repeats the rows under each.
        latency_rounds: times each row is timed; 0 leaves latency out.
        latency_batch_size: images decoded at once when timing.
        grid_images: images kept of each row for side-by-side grids.
        random_weights: the weights are random, at published sizes: ``test`` measures latency alone, draws no images and
            gives no figure of quality.
        compiled: run base and predictors' networks through ``torch.compile``.
        compile_mode: ``reduce-overhead`` replays CUDA graphs, for plans that are fixed before a run.
        memory_limit_gb: features of a batch that ``predict`` keeps in the memory of the base's device, in GB (10⁹
            bytes); batches that wait to be written take as much each. Where a batch's take more, they go to a file step
            by step, and no trajectory lies in memory whole.
        scratch: folder of such files, on a disk and not in memory (tmpfs); they leave nothing behind.
    """

    def __init__(
        self,
        base: MaskedImageModel,
        *,
        decoding: Decoding | None = None,
        rows: list[Row] | None = None,
        metrics: dict[str, ImageMetric] | None = None,
        results: Path = Path("runs/results"),
        run_seeds: list[int] | None = None,
        latency_rounds: int = 5,
        latency_batch_size: int = 32,
        grid_images: int = 20,
        random_weights: bool = False,
        compiled: bool = False,
        compile_mode: Mode = "default",
        memory_limit_gb: float = 8.0,
        scratch: Path = SCRATCH,
    ) -> None:
        super().__init__()
        if not memory_limit_gb >= 0:
            raise ValueError(f"memory_limit_gb must be at least 0, got {memory_limit_gb}")
        assert isinstance(base, nn.Module)
        self.base: MaskedImageModel = base
        self.decoding = decoding or Decoding()
        self.rows, self.metrics, self.results = rows or [], metrics or {}, Results(results)
        self.methods = nn.ModuleList(row.method for row in self.rows if isinstance(row.method, nn.Module))
        self.run_seeds = run_seeds or [0]
        self.latency_rounds, self.latency_batch_size = latency_rounds, latency_batch_size
        self.grid_images, self.random_weights = grid_images, random_weights
        self.compiled, self.compile_mode = compiled, compile_mode
        self.memory_limit_gb, self.scratch = memory_limit_gb, Path(scratch)
        self.reference = Row(self.decoding.num_steps)
        self.jobs: list[tuple[Row, int]] = []

    def on_predict_start(self) -> None:
        """Compile, where that is asked for."""
        if self.compiled:
            compile_networks(self.base, (), self.compile_mode)

    def predict_step(self, batch: Conditions, batch_idx: int) -> Trajectories:
        """Trajectories of one batch by the base alone, all features kept."""
        return record(self.base, batch, self.decoding, memory_limit_gb=self.memory_limit_gb, scratch=self.scratch)

    def setup(self, stage: str) -> None:
        """Check rows and conditions before anything is run.

        Raises:
            ValueError: if the base does not know a condition, two rows have one name, the reference is missing, a row
                cannot be run, or Lightning would leave out images that the rows' values count; or if latency, all there
                is to random weights, is left out, too.
            OSError: if the results' folder cannot be written.
        """
        if stage == "predict":
            tokens_per_step(self.decoding.schedule, self.decoding.num_steps, self.base.spec.num_tokens)
            if (datamodule := getattr(self.trainer, "datamodule", None)) is not None:
                require_known(self.base, self.decoding, datamodule)
        if stage != "test":
            return
        if self.random_weights and not self.latency_rounds:
            raise ValueError("random weights have a latency alone: latency_rounds must be at least 1")
        names = [row.name for row in self.rows]
        if len(set(names)) != len(names):
            raise ValueError(f"rows must differ from one another; got {names}")
        if self.reference.name not in names:
            raise ValueError(f"rows must hold {self.reference.name}, which speed-up refers to; got {names}")
        if isinstance(self.trainer.limit_test_batches, int) or self.trainer.limit_test_batches < 1:  # 1 is one batch
            raise ValueError("rows are of all images: leave limit_test_batches and set data.init_args.num_images")
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        require_feasible(self.base, self.decoding, self.rows, data)
        require_writable(self.results.folder)

    def test_dataloader(self) -> list[Iterable[Conditions]]:
        """One pass over the conditions for each row that is not finished, and one for latency."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        jobs = [] if self.random_weights else [(row, seed) for seed in self.run_seeds for row in self.rows]
        self.jobs = [job for job in jobs if self.results.find(*job, self.facts(job[0])) is None]
        if len(self.jobs) < len(jobs):
            rank_zero_info(f"{len(jobs) - len(self.jobs)} of {len(jobs)} rows are finished already")
        return [data.loader(seed) for _, seed in self.jobs] + [data.loader()]

    def on_test_start(self) -> None:
        """Move the metrics to the task's device; compile, where that is asked for."""
        for metric in self.metrics.values():
            metric.to(self.device)
        if self.compiled:
            compile_networks(self.base, self.methods, self.compile_mode)

    def test_step(self, batch: Conditions, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Measure one batch of images, or latency when all rows are done."""
        if dataloader_idx == len(self.jobs):
            if batch_idx == 0 and self.latency_rounds:
                self._measure_latency(batch)
            return
        row, seed = self.jobs[dataloader_idx]
        images = images_of(self.base, batch, self.decoding, row)
        add_images(self.metrics.values(), images, batch)
        if batch_idx == 0 and seed == self.run_seeds[0] and self.trainer.is_global_zero:
            self.results.add_images(row, images[: self.grid_images], batch.prompts[: self.grid_images])
        if batch_idx == int(self.trainer.num_test_batches[dataloader_idx]) - 1:
            self._finish(row, seed)

    def facts(self, row: Row) -> dict[str, Any]:
        """What ``row``'s values depend on besides the run seed."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        facts = row_facts(self.base, self.decoding, row, data.num_images)
        facts |= {"precision": str(self.trainer.precision), "metrics": sorted(self.metrics)}
        if data.prompts_sha256:  # a base that takes prompts draws images of any size with the same weights
            facts |= {"prompts": data.prompts_sha256, "spec": self.base.spec._asdict()}
        return facts | ({"compiled": True} if self.compiled else {})

    def _finish(self, row: Row, seed: int) -> None:
        values = take_values(self.metrics)
        if self.trainer.is_global_zero:
            self.results.add(row, seed, self.facts(row), values)
        shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        rank_zero_info(f"{row.name}, seed {seed}: {shown}")

    def _measure_latency(self, batch: Conditions) -> None:
        conditions = batch.first(self.latency_batch_size)
        facts = {"rows": [self.facts(row) for row in self.rows], "rounds": self.latency_rounds}
        facts |= {"device": str(self.device), "batch_size": len(conditions.ids)}
        stored = self.results.latency()
        if stored is not None and stored["facts"] == facts:
            return
        rank_zero_info(f"timing {len(self.rows)} rows, {self.latency_rounds} rounds in turns")
        runs: dict[str, Callable[[], object]] = {
            row.name: partial(generate, self.base, conditions, row.decoding(self.decoding), row.method)
            for row in self.rows
        }
        latencies = measure_latency(runs, self.device, len(conditions.ids), self.latency_rounds)
        ratios = speedups(latencies, self.reference.name)
        if self.trainer.is_global_zero:
            measured = {name: latency._asdict() | {"speedup": ratios[name]} for name, latency in latencies.items()}
            self.results.set_latency(facts, measured)
