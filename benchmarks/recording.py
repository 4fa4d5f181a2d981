"""What recording costs beside sampling the same images."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
import torch
from torch import Tensor

from benchmarks.decodings import decoding_of
from benchmarks.table import Table
from datamodules.conditions import ClassLabels, InTurn
from lit_shortcut.acceleration.accelerated import Vanilla
from lit_shortcut.callbacks.trajectory_writer import TrajectoryWriter
from lit_shortcut.contracts import Conditions, MaskedImageModel
from lit_shortcut.fashion.embedded import fashion
from lit_shortcut.metrics.latency import measure_latency
from lit_shortcut.sampling import Decoding, generate
from lit_shortcut.tasks.recording import RecordingTask

NUM_IMAGES, BATCH_SIZE, ROUNDS = 96, 32, 3
PLAIN = "sampling only"


class _Sampling(RecordingTask):
    """Predicts tokens and keeps no features."""

    def predict_step(self, batch: Conditions, batch_idx: int) -> Tensor:  # type: ignore[override]  # that is the point
        return generate(self.base, batch, self.decoding, Vanilla()).tokens


def measure() -> Table:
    """Predict the same images with and without recording, in turns, by the clock and by the processors' time."""
    base, decoding = fashion("checkpoints/fashion"), decoding_of("fashion")
    sampling, recording = _Sampling(base, decoding=decoding), RecordingTask(base, decoding=decoding)
    wall: dict[str, float] = {}
    with TemporaryDirectory() as scratch:
        runs: dict[str, Callable[[], object]] = {PLAIN: partial(_predict, sampling)}
        for dtype in ("bfloat16", "int8"):
            runs[f"recording {dtype}"] = partial(_record, recording, Path(scratch) / dtype, dtype)
        timed = {name: _timed(name, run, wall) for name, run in runs.items()}
        spent = measure_latency(timed, torch.device("cpu"), NUM_IMAGES, ROUNDS, warmup=0, clock=time.process_time)
    rows: list[dict[str, Any]] = [
        {
            "what": name,
            "processor ms an image": latency.median_ms,
            "processor time over sampling, %": 100 * (latency.median_ms / spent[PLAIN].median_ms - 1),
            "clock over sampling, %": 100 * (wall[name] / wall[PLAIN] - 1),
        }
        for name, latency in spent.items()
    ]
    note = (
        f"The embedded default, {NUM_IMAGES} images in batches of {BATCH_SIZE}, {ROUNDS} rounds in turns: medians of "
        "the time all threads spent on the processors, and the least time by the clock. What a shard costs is spent "
        "beside the next batch; with the base on a GPU its processor time is nobody's."
    )
    return Table("Recording", rows, note)


def time_recording(
    base: MaskedImageModel, decoding: Decoding, asked: InTurn, folder: Path, **trainer: Any
) -> dict[str, float]:
    """Least seconds of two rounds that sampling and recording of what is ``asked`` take, by a ``trainer`` like this."""
    sampling, recording = _Sampling(base, decoding=decoding), RecordingTask(base, decoding=decoding)
    writers = {f"recording {encoding}": encoding for encoding in ("bfloat16", "int8")}
    least: dict[str, float] = {}
    for _ in range(2):
        _timed(PLAIN, partial(_predict, sampling, asked=asked, **trainer), least)()
        for name, encoding in writers.items():
            writer = TrajectoryWriter(folder / encoding, encoding, overwrite=True)
            _timed(name, partial(_predict, recording, writer, asked=asked, **trainer), least)()
    return least


def _predict(
    task: L.LightningModule,
    *callbacks: L.Callback,
    asked: InTurn | None = None,
    accelerator: str = "cpu",
    **trainer: Any,
) -> None:
    predicting = L.Trainer(
        accelerator=accelerator,
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **trainer,
    )
    asked = asked or ClassLabels(NUM_IMAGES, BATCH_SIZE)
    predicting.predict(task, datamodule=asked, return_predictions=False)


def _record(task: L.LightningModule, folder: Path, encoding: str) -> None:
    _predict(task, TrajectoryWriter(folder, encoding, overwrite=True))


def _timed(name: str, run: Callable[[], object], least: dict[str, float]) -> Callable[[], object]:
    """``run``, which also enters the least time by the clock."""

    def timed() -> None:
        start = time.perf_counter()
        run()
        least[name] = min(least.get(name, float("inf")), time.perf_counter() - start)

    return timed
