from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import matplotlib.pyplot as plt
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from datamodules.conditions import ClassLabels
from lit_shortcut.acceleration.accelerated import Accelerated
from lit_shortcut.acceleration.plans import Even
from lit_shortcut.acceleration.predictors import Hold
from lit_shortcut.bases.toy import ToyBase
from lit_shortcut.callbacks.report import Report
from lit_shortcut.evaluation import Row
from lit_shortcut.sampling import Decoding
from lit_shortcut.tasks.generation import GenerationTask


class Count:
    """The number of images: a metric whose value is known."""

    def __init__(self) -> None:
        self.seen = 0

    def update(self, images: Tensor, labels: Tensor) -> None:
        self.seen += len(images)

    def compute(self) -> Tensor:
        return torch.tensor(self.seen)

    def reset(self) -> None:
        self.seen = 0

    def to(self, device: torch.device) -> None: ...


def measure(
    folder: Path, quality: str | None = "count", num_images: int = 6, logger: Any = False, **arguments: Any
) -> str:
    """Measure three rows and return the report."""
    settings: dict[str, Any] = {"latency_rounds": 1, "latency_batch_size": 2, "grid_images": 1}
    settings |= {"metrics": {"count": Count()}}
    task = GenerationTask(
        ToyBase(),
        decoding=Decoding(num_steps=5),
        rows=[Row(5), Row(3), Row(5, Accelerated(Even(2), Hold()))],
        results=folder,
        **(settings | arguments),
    )
    quiet: dict[str, Any] = {"accelerator": "cpu", "enable_progress_bar": False, "logger": logger}
    trainer = L.Trainer(**quiet, callbacks=[Report(quality)])
    trainer.test(task, datamodule=ClassLabels(num_images, batch_size=4), verbose=False)
    return (folder / "report.md").read_text()


def test_report_says_what_was_measured_and_how(tmp_path: Path) -> None:
    text = measure(tmp_path, run_seeds=[4, 5])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    assert [row[:3] for row in rows] == [
        ["method", "N", "b"],
        ["vanilla", "5", "5"],
        ["vanilla", "3", "3"],
        ["hold", "5", "2"],
    ]
    assert {row[-1] for row in rows[1:]} == {"6.000 ± 0.000"}
    for part in ("6 images a row and seed, 2 seed(s)", "N = 5", "of 1 rounds in turns, batch 2", "precision 32-true"):
        assert part in text
    assert "dominates" not in text  # all distances are equal
    for name in ("grids.png", "pareto.png"):
        assert (tmp_path / name).stat().st_size > 1000
    assert not plt.get_fignums()


def test_report_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("lit_shortcut.callbacks.report.rank_zero_info", said.append)
    text = measure(tmp_path)
    assert any(text in line for line in said)


def test_report_without_latency_has_neither_plot_nor_column(tmp_path: Path) -> None:
    text = measure(tmp_path, latency_rounds=0)
    assert "latency ms/image" not in text
    assert not (tmp_path / "pareto.png").exists()
    assert (tmp_path / "grids.png").exists()


def test_random_weights_have_latencies_and_no_quality(tmp_path: Path) -> None:
    text = measure(tmp_path, random_weights=True, quality=None, metrics={})
    header, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line]
    assert header == ["method", "N", "b", "latency ms/image", "speed-up"]
    assert [row[:3] for row in rows] == [["vanilla", "5", "5"], ["vanilla", "3", "3"], ["hold", "5", "2"]]
    assert rows[0][4] == "1.00×"
    assert "Random weights: latency alone" in text
    assert "images a row" not in text
    assert {path.name for path in tmp_path.iterdir()} == {"latency.json", "report.md"}


def test_random_weights_yield_no_quality_even_where_there_are_metrics(tmp_path: Path) -> None:
    assert "count" not in measure(tmp_path, random_weights=True)


def test_few_images_are_warned_of_and_many_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "Fewer than 5,000 images" in measure(tmp_path)
    monkeypatch.setattr("lit_shortcut.callbacks.report.FEW_IMAGES", 6)
    assert "Fewer" not in measure(tmp_path)


def test_rows_of_earlier_run_seeds_do_not_enter(tmp_path: Path) -> None:
    measure(tmp_path, run_seeds=[0, 1])
    assert "4 images a row and seed, 1 seed(s)" in measure(tmp_path, run_seeds=[0], num_images=4)


def test_quality_that_is_no_metric_is_refused_before_anything_is_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"quality must be one of the metrics \['count'\], got 'fid'"):
        measure(tmp_path, quality="fid")
    assert list(tmp_path.iterdir()) == []


def test_loggers_get_table_and_pictures(tmp_path: Path) -> None:
    measure(tmp_path / "results", logger=CSVLogger(tmp_path, name="logs"))
    found = {path.name for path in (tmp_path / "logs" / "version_0").iterdir()}
    assert {"report_table.csv", "report_grids_step0.png", "report_pareto_step0.png"} <= found
