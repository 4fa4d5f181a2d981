"""Write the report when ``test`` ends."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import NamedTuple

import lightning as L
import matplotlib.pyplot as plt
import pandas as pd
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_info

from lit_shortcut.acceleration.shortcut import Shortcut, shortcut_of
from lit_shortcut.bounds import require_share
from lit_shortcut.evaluation.identity import computed_in, dtype_of
from lit_shortcut.loggers import carry_on, log_artifact, log_page, log_picture, log_table
from lit_shortcut.metrics.latency import device_name
from lit_shortcut.report.closing import closing
from lit_shortcut.report.document import json_of, notes
from lit_shortcut.report.grids import grids, read_strips, strip_paths
from lit_shortcut.report.page import page
from lit_shortcut.report.plot import pareto, pixels, variant
from lit_shortcut.report.provenance import provenance
from lit_shortcut.report.table import collect, current_latencies, markdown
from lit_shortcut.tasks.evaluation import EvaluationTask
from lit_shortcut.trials import is_trial


class _Strips(NamedTuple):
    """PNG files of the strips of images by row, and the prompts of their columns."""

    paths: dict[str, Path]
    prompts: list[str]


class Report(L.Callback):
    """Table (``report.md``, ``report.json``), Pareto plot (``pareto.png``) and grids (``grids.png``) of finished rows.

    A page, ``report.html``, has all of them to hover over and click. The files are written to the task's results folder
    and sent to the loggers, and the table is printed. With random weights there is only the table, which then says that
    it holds latencies only. A trial run prints the table and writes nothing. A picture or logger that fails is logged
    as an error and does not affect the rest.

    Args:
        quality: the metric on the plot's vertical axis; with random weights there is none.
        then: verb and arguments of the command to run next, printed in the last line; ``{shortcut}`` stands for the
            folder of the first shortcut among the rows, and without one there is no line.
        step_share: share of a base pass that a shortcut step takes on a base of interest, such as 0.028 at MaskGIT's
            published size; the report computes what its rows would cost there.

    Raises:
        ValueError: if ``step_share`` is not between 0 and 1.
    """

    def __init__(self, quality: str | None = None, then: str = "", step_share: float | None = None) -> None:
        if step_share is not None:
            require_share(step_share=step_share)
        self.quality, self.then, self.step_share = quality, then, step_share

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check, before anything is measured, that ``quality`` will be.

        Raises:
            ValueError: if the task has no metric named ``quality``.
        """
        assert isinstance(pl_module, EvaluationTask)
        if self.quality not in pl_module.metrics and not pl_module.random_weights:
            raise ValueError(f"quality must be one of the metrics {sorted(pl_module.metrics)}, got {self.quality!r}")

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Collect, write, print and log the report, on the first rank."""
        assert isinstance(pl_module, EvaluationTask)
        if not trainer.is_global_zero:
            return
        task, results = pl_module, pl_module.stored
        seeds = [] if task.random_weights else task.run_seeds
        table = collect(results, task.rows, seeds, task.loops, task.reference.name)
        latencies = current_latencies(results, task.loops)
        quality = None if task.random_weights else self.quality
        higher_is_better = bool(quality and task.metrics[quality].higher_is_better)
        below = notes(
            table,
            quality,
            next(iter(latencies.values()), None),
            higher_is_better=higher_is_better,
            num_steps=task.decoding.num_steps,
            dtype=computed_in(task.base, str(trainer.precision)),
            incomplete=[row.name for row in task.rows if row.name not in latencies],
            shortcuts=list(_shortcuts(task)),
            step_share=self.step_share,
        )
        text = f"{markdown(table)}\n\n{below}\n"
        figures = json_of(
            table,
            quality=quality,
            higher_is_better=higher_is_better,
            num_steps=task.decoding.num_steps,
            seeds=seeds,
            precision=str(trainer.precision),
            dtype=dtype_of(task.base),
            latency=results.latency() if latencies else None,
            identities=task.identities,
        )
        if is_trial(trainer, "test"):
            rank_zero_info(f"\n{text}\na trial run: nothing is written or logged")
            return
        folder = results.folder
        (folder / "report.md").write_text(text, encoding="utf-8")
        (folder / "report.json").write_text(figures, encoding="utf-8")
        strips = _strips(task)
        written = ["report.md", "report.json", *self._pictures(trainer, task, table, strips, higher_is_better)]
        written += self._page(trainer, task, table, strips, below, higher_is_better)
        log_table(trainer, "report/table", table)
        log_artifact(trainer, "report", "report", [folder / name for name in written])
        last = closing(
            table,
            shortcuts=list(_shortcuts(task)),
            reference=task.reference.name,
            quality=quality,
            higher_is_better=higher_is_better,
            page=folder / "report.html" if "report.html" in written else None,
            command=self._next(task),
        )
        rank_zero_info(f"\n{text}\nwritten to {folder}: {', '.join(written)}\n\n{last}")

    def _next(self, task: EvaluationTask) -> str:
        """Return the command to run next; empty if there is none."""
        folder = next((shortcut.folder for shortcut in _shortcuts(task).values() if shortcut.folder), None)
        if not self.then or ("{shortcut}" in self.then and folder is None):
            return ""
        return f"{sys.argv[0]} {self.then.replace('{shortcut}', _shown(folder or Path()))}"

    def _pictures(
        self, trainer: L.Trainer, task: EvaluationTask, table: pd.DataFrame, strips: _Strips, higher_is_better: bool
    ) -> list[str]:
        """Draw, write and log whatever pictures there are; return their file names."""
        written: list[str] = []
        folder = task.stored.folder
        if task.random_weights:
            return written
        with carry_on("drawing the grids"):
            if strips.paths:
                figure = grids(read_strips(strips.paths), strips.prompts)
                written.append(_keep(trainer, figure, folder / "grids.png"))
        with carry_on("drawing the Pareto plot"):
            if self.quality is not None and {"latency_ms", self.quality} <= set(table.columns):
                figure = pareto(table, self.quality, higher_is_better=higher_is_better)
                written.append(_keep(trainer, figure, folder / "pareto.png"))
                _log_pareto(trainer, table, self.quality)
        plt.close("all")
        return written

    def _page(
        self,
        trainer: L.Trainer,
        task: EvaluationTask,
        table: pd.DataFrame,
        strips: _Strips,
        below: str,
        higher_is_better: bool,
    ) -> list[str]:
        """Write and log the page; return its file name."""
        written: list[str] = []
        path = task.stored.folder / "report.html"
        with carry_on("writing the page"):
            text = page(
                table,
                reference=task.reference.name,
                quality=None if task.random_weights else self.quality,
                higher_is_better=higher_is_better,
                strips=strips.paths,
                prompts=strips.prompts,
                notes=below,
                provenance=provenance()
                | {
                    "device": device_name(task.device),
                    "dtype": dtype_of(task.base),
                    "precision": trainer.precision,
                    "run seeds": ", ".join(map(str, task.run_seeds)),
                },
            )
            path.write_text(text, encoding="utf-8")
            log_page(trainer, "report/page", path)
            written.append(path.name)
        return written


def _strips(task: EvaluationTask) -> _Strips:
    if task.grid_images and not task.random_weights:
        with carry_on("reading the strips of images"):
            paths = strip_paths(task.stored, task.rows, task.reference)
            shown = [row for row in task.rows if row.name in paths]
            return _Strips(paths, task.stored.columns(shown[0]).get("prompts", []) if shown else [])
    return _Strips({}, [])


def _shown(path: Path) -> str:
    """Return ``path`` as one would type it in the current folder."""
    path, here = path.absolute(), Path.cwd()
    return shlex.quote(str(path.relative_to(here) if path.is_relative_to(here) else path))


def _shortcuts(task: EvaluationTask) -> dict[str, Shortcut]:
    """Return the trained shortcuts by the names of their rows."""
    found = {row.name: shortcut_of(row.acceleration) for row in task.rows}
    return {name: shortcut for name, shortcut in found.items() if shortcut is not None}


def _keep(trainer: L.Trainer, figure: plt.Figure, path: Path) -> str:
    figure.savefig(path, dpi=130)
    log_picture(trainer, f"report/{path.stem}", pixels(figure))
    return path.name


def _log_pareto(trainer: L.Trainer, table: pd.DataFrame, metric: str) -> None:
    """Log one point per row to W&B, with latency as the horizontal axis."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            run = logger.experiment
            run.define_metric("pareto/latency_ms")
            run.define_metric("pareto/*", step_metric="pareto/latency_ms")
            for _, line in table.dropna(subset=["latency_ms", metric]).iterrows():
                run.log({"pareto/latency_ms": line["latency_ms"], f"pareto/{variant(line)}/{metric}": line[metric]})
