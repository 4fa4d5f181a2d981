"""Write the report when ``test`` ends."""

from __future__ import annotations

import lightning as L
import matplotlib.pyplot as plt
import pandas as pd
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_info

from lit_shortcut.loggers import log_picture, log_table
from lit_shortcut.report import collect, dominated, grids, markdown, pareto, pixels, read_strips
from lit_shortcut.tasks.generation import GenerationTask

FEW_IMAGES = 5_000  # below, a Fréchet distance depends visibly on their number


class Report(L.Callback):
    """Table (``report.md``), Pareto plot (``pareto.png``) and image grids (``grids.png``) of all finished rows.

    They are written to the task's results folder, the table is printed, and all go to the loggers.

    Args:
        distance: the metric on the plot's vertical axis, lower is better.
    """

    def __init__(self, distance: str) -> None:
        self.distance = distance

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a metric that is not measured, before anything is.

        Raises:
            ValueError: if the task has no metric named ``distance``.
        """
        assert isinstance(pl_module, GenerationTask)
        if self.distance not in pl_module.metrics:
            raise ValueError(f"distance must be one of the metrics {sorted(pl_module.metrics)}, got {self.distance!r}")

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Collect, write, print, log; on the first rank."""
        assert isinstance(pl_module, GenerationTask)
        if not trainer.is_global_zero:
            return
        folder, names = pl_module.results.folder, [row.name for row in pl_module.rows]
        table = collect(folder, names, pl_module.run_seeds)
        strips = grids(read_strips(folder, list(table["name"])))
        strips.savefig(folder / "grids.png", dpi=130)
        log_picture(trainer, "report/grids", pixels(strips))
        if "latency_ms" in table:
            figure = pareto(table, self.distance)
            figure.savefig(folder / "pareto.png", dpi=130)
            log_picture(trainer, "report/pareto", pixels(figure))
            _log_pareto(trainer, table, self.distance)
        plt.close("all")
        log_table(trainer, "report/table", table)
        text = _text(table, pl_module, self.distance)
        (folder / "report.md").write_text(text)
        rank_zero_info(f"\n{text}\nwritten to {folder}: report.md, pareto.png, grids.png")


def _text(table: pd.DataFrame, task: GenerationTask, distance: str) -> str:
    images, seeds = sorted(set(table["images"])), sorted(set(table["seeds"]))
    lines = [
        markdown(table),
        "",
        f"{_several(images)} images a row and seed, {_several(seeds)} seed(s); ± is a 95 % interval of the mean over "
        "seeds (Student's t). The speed-up refers to vanilla at the base's default "
        f"N = {task.decoding.num_steps}.",
    ]
    if max(images) < FEW_IMAGES:
        lines.append(
            f"Fewer than {FEW_IMAGES:,} images: distances are biased upwards, compare these rows with one another."
        )
    measured = task.results.latency()
    if measured is not None and "latency_ms" in table:
        how = next(iter(measured["measured"].values()))
        lines += [
            f"Latency: decoding loop alone, median (interquartile range) of {how['rounds']} rounds in turns, batch "
            f"{how['batch_size']}, precision {task.trainer.precision}, {how['device']}."
        ]
        pairs = dominated(table, distance)
        lines += [""] * bool(pairs)
        lines += [f"- {winner} dominates {loser}: lower {distance} at no more latency" for winner, loser in pairs]
    return "\n".join(lines) + "\n"


def _several(numbers: list[int]) -> str:
    return " or ".join(f"{number:,}" for number in numbers)


def _log_pareto(trainer: L.Trainer, table: pd.DataFrame, metric: str) -> None:
    """One point a row on W&B, with latency as the axis."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            run = logger.experiment
            run.define_metric("pareto/latency_ms")
            run.define_metric("pareto/*", step_metric="pareto/latency_ms")
            for _, line in table.iterrows():
                run.log({"pareto/latency_ms": line["latency_ms"], f"pareto/{line['method']}/{metric}": line[metric]})
