"""Write the report when ``test`` ends."""

from __future__ import annotations

from typing import Any

import lightning as L
import matplotlib.pyplot as plt
import pandas as pd
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_info

from lit_shortcut.loggers import log_picture, log_table
from lit_shortcut.report import (
    collect,
    collect_latencies,
    dominated,
    grids,
    markdown,
    pareto,
    pixels,
    read_captions,
    read_strips,
)
from lit_shortcut.tasks.generation import GenerationTask

FEW_IMAGES = 5_000  # below, a Fréchet distance depends visibly on their number


class Report(L.Callback):
    """Table (``report.md``), Pareto plot (``pareto.png``) and image grids (``grids.png``) of all finished rows.

    They are written to the task's results folder, the table is printed, and all go to the loggers. Of random weights
    there is the table alone, with latencies alone, and it says so.

    Args:
        quality: the metric on the plot's vertical axis; with random weights there is none.
        higher_is_better: of that metric; false for distances.
    """

    def __init__(self, quality: str | None = None, *, higher_is_better: bool = False) -> None:
        self.quality, self.higher_is_better = quality, higher_is_better

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a metric that is not measured, before anything is.

        Raises:
            ValueError: if the task has no metric named ``quality``.
        """
        assert isinstance(pl_module, GenerationTask)
        if self.quality not in pl_module.metrics and not pl_module.random_weights:
            raise ValueError(f"quality must be one of the metrics {sorted(pl_module.metrics)}, got {self.quality!r}")

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Collect, write, print, log; on the first rank."""
        assert isinstance(pl_module, GenerationTask)
        if not trainer.is_global_zero:
            return
        folder, names = pl_module.results.folder, [row.name for row in pl_module.rows]
        if pl_module.random_weights:
            table, written = collect_latencies(folder), ["report.md"]
            lines = [markdown(table), "", _RANDOM, _speedup_text(pl_module), *_latency_text(pl_module)]
        else:
            table, written = collect(folder, names, pl_module.run_seeds), ["report.md", "grids.png"]
            strips = grids(read_strips(folder, list(table["name"])), read_captions(folder))
            strips.savefig(folder / "grids.png", dpi=130)
            log_picture(trainer, "report/grids", pixels(strips))
            assert self.quality is not None
            if "latency_ms" in table:
                figure = pareto(table, self.quality, higher_is_better=self.higher_is_better)
                figure.savefig(folder / "pareto.png", dpi=130)
                written.append("pareto.png")
                log_picture(trainer, "report/pareto", pixels(figure))
                _log_pareto(trainer, table, self.quality)
            plt.close("all")
            lines = _lines(table, pl_module, self.quality, self.higher_is_better)
        log_table(trainer, "report/table", table)
        text = "\n".join(lines) + "\n"
        (folder / "report.md").write_text(text)
        rank_zero_info(f"\n{text}\nwritten to {folder}: {', '.join(written)}")


_RANDOM = "Random weights: latency alone. No images were drawn, and no figure of quality comes from here."


def _lines(table: pd.DataFrame, task: GenerationTask, quality: str, higher_is_better: bool) -> list[str]:
    images, seeds = sorted(set(table["images"])), sorted(set(table["seeds"]))
    lines = [
        markdown(table),
        "",
        f"{_several(images)} images a row and seed, {_several(seeds)} seed(s); ± is a 95 % interval of the mean over "
        f"seeds (Student's t). {_speedup_text(task)}",
    ]
    if max(images) < FEW_IMAGES:
        lines.append(
            f"Fewer than {FEW_IMAGES:,} images: distances are biased upwards, compare these rows with one another."
        )
    if "latency_ms" in table:
        lines += _latency_text(task)
        pairs = dominated(table, quality, higher_is_better=higher_is_better)
        lines += [""] * bool(pairs)
        lines += [
            f"- {winner} dominates {loser}: {'higher' if higher_is_better else 'lower'} {quality} at no more latency"
            for winner, loser in pairs
        ]
    return lines


def _speedup_text(task: GenerationTask) -> str:
    return f"The speed-up refers to vanilla at the base's default N = {task.decoding.num_steps}."


def _latency_text(task: GenerationTask) -> list[str]:
    measured = task.results.latency()
    if measured is None:
        return []
    how = next(iter(measured["measured"].values()))
    return [
        f"Latency: decoding loop alone, median (interquartile range) of {how['rounds']} rounds in turns, batch "
        f"{how['batch_size']}, precision {task.trainer.precision}, {how['device']}."
    ]


def _several(numbers: list[int]) -> str:
    return " or ".join(f"{number:,}" for number in numbers)


def _series(line: pd.Series[Any]) -> str:
    return f"{line['method']} {line['order']}".strip()


def _log_pareto(trainer: L.Trainer, table: pd.DataFrame, metric: str) -> None:
    """One point a row on W&B, with latency as the axis."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            run = logger.experiment
            run.define_metric("pareto/latency_ms")
            run.define_metric("pareto/*", step_metric="pareto/latency_ms")
            for _, line in table.iterrows():
                run.log({"pareto/latency_ms": line["latency_ms"], f"pareto/{_series(line)}/{metric}": line[metric]})
