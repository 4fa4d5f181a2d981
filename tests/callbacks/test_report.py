from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import matplotlib.pyplot as plt
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from datamodules.conditions import ClassLabels
from lit_shortcut.acceleration.predictors import Hold, Taylor
from lit_shortcut.acceleration.shortcut import Shortcut
from lit_shortcut.bases.toy import ToyBase
from lit_shortcut.callbacks.report import Report
from lit_shortcut.contracts import Conditions
from lit_shortcut.metrics.images import ImageMean
from lit_shortcut.networks.shortcut import ShortcutNet
from lit_shortcut.sampling import Decoding
from lit_shortcut.tasks.evaluation import EvaluationTask


class Count(ImageMean):
    """The number of images: a metric whose value is known."""

    higher_is_better = False

    def update(self, images: Tensor, conditions: Conditions) -> None:
        self.add(torch.ones(len(images)))

    def compute(self) -> Tensor:
        return self.total


def measure(
    folder: Path,
    quality: str | None = "count",
    num_images: int = 6,
    logger: Any = False,
    run_seeds: list[int] | None = None,
    then: str = "",
    base: ToyBase | None = None,
    precision: Any = "32-true",
    **arguments: Any,
) -> str:
    """Measure three rows and return the report."""
    settings: dict[str, Any] = {"latency_rounds": 1, "latency_batch_size": 2, "grid_images": 1}
    settings |= {"metrics": {"count": Count()}, "methods": {"hold": Hold()}}
    settings |= {"rows": [[5], [3], [5, 2, "hold"]]}
    task = EvaluationTask(base or ToyBase(), decoding=Decoding(num_steps=5), results=folder, **(settings | arguments))
    quiet: dict[str, Any] = {"accelerator": "cpu", "enable_progress_bar": False, "logger": logger}
    trainer = L.Trainer(**quiet, precision=precision, callbacks=[Report(quality, then)])
    trainer.test(task, datamodule=ClassLabels(num_images, batch_size=4, run_seeds=run_seeds), verbose=False)
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
    for part in ("6 images per row and seed, 2 seed(s)", "N = 5", "of 1 rounds in turns", "batch 2, float32, "):
        assert part in text
    assert "dominates" not in text  # all distances are equal
    for name in ("grids.png", "pareto.png", "report.html"):
        assert (tmp_path / name).stat().st_size > 1000
    figures = json.loads((tmp_path / "report.json").read_text())
    assert [row["count"] for row in figures["rows"]] == [6.0] * 3
    assert (figures["seeds"], figures["precision"], figures["dtype"]) == ([4, 5], "32-true", "float32")
    assert figures["identities"]["vanilla_n5"]["conditions"]["num_images"] == 6
    assert not plt.get_fignums()


@pytest.mark.parametrize(
    ("precision", "told"),
    [("32-true", "bfloat16"), ("bf16-true", "bfloat16"), ("bf16-mixed", "bf16-mixed on bfloat16 weights")],
)
def test_report_names_the_dtype_of_the_weights_not_of_the_trainer(tmp_path: Path, precision: Any, told: str) -> None:
    text = measure(tmp_path, base=ToyBase().bfloat16(), precision=precision)
    assert f"batch 2, {told}, " in text
    assert "32-true" not in text


def test_report_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("lit_shortcut.callbacks.report.rank_zero_info", said.append)
    text = measure(tmp_path)
    assert any(text in line for line in said)


def test_last_lines_are_page_and_next_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("lit_shortcut.callbacks.report.rank_zero_info", said.append)
    monkeypatch.setattr("sys.argv", ["bin/lit-shortcut", "test"])
    measure(tmp_path, then="generate --compare")
    assert said[-1].splitlines()[-2:] == [
        f"page: {tmp_path / 'report.html'}",
        "next: bin/lit-shortcut generate --compare",
    ]


def test_next_command_names_the_folder_of_the_shortcut_that_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("lit_shortcut.callbacks.report.rank_zero_info", said.append)
    monkeypatch.setattr("sys.argv", ["lit-shortcut", "test"])
    monkeypatch.chdir(tmp_path)
    mine = Shortcut(ShortcutNet(ToyBase().spec.width, num_heads=1))
    arguments: dict[str, Any] = {"rows": [[5], [5, 2, "mine"]], "then": "generate {shortcut} --compare"}
    measure(tmp_path / "none", methods={"mine": mine}, **arguments)
    assert said[-1].splitlines()[-1].startswith("page: ")
    mine.save_pretrained(tmp_path / "my shortcut")
    measure(tmp_path / "one", methods={"mine": Shortcut.load(tmp_path / "my shortcut")}, **arguments)
    assert said[-1].splitlines()[-1] == "next: lit-shortcut generate 'my shortcut' --compare"


def test_best_of_the_trained_shortcuts_is_named_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("lit_shortcut.callbacks.report.rank_zero_info", said.append)
    base = ToyBase()
    network = ShortcutNet(base.spec.width, num_heads=1)
    measure(tmp_path, methods={"hold": Hold(), "mine": Shortcut(network)}, rows=[[5], [5, 2, "hold"], [5, 2, "mine"]])
    assert "best shortcut: mine_n5_b2 has count 6.000" in said[-1].splitlines()[-2]


def test_report_without_latency_has_neither_plot_nor_column(tmp_path: Path) -> None:
    text = measure(tmp_path, latency_rounds=0)
    assert "latency ms/image" not in text
    assert not (tmp_path / "pareto.png").exists()
    assert (tmp_path / "grids.png").exists()


def test_report_without_grids_has_none(tmp_path: Path) -> None:
    measure(tmp_path, grid_images=0)
    assert not (tmp_path / "grids.png").exists()
    assert not (tmp_path / "images").exists()


@pytest.mark.parametrize("broken", ["grids", "pareto", "page", "log_picture"])
def test_picture_that_fails_is_logged_and_the_rest_is_kept(
    tmp_path: Path, broken: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("no such glyph")

    monkeypatch.setattr(f"lit_shortcut.callbacks.report.{broken}", fail)
    assert "| hold" in measure(tmp_path)
    assert (tmp_path / "report.json").exists()
    assert "no such glyph" in caplog.text
    assert not plt.get_fignums()


def test_latencies_are_those_of_the_present_networks(tmp_path: Path) -> None:
    assert "latency ms/image" in measure(tmp_path)
    assert "latency ms/image" in measure(tmp_path, latency_rounds=0)
    text = measure(tmp_path, latency_rounds=0, methods={"hold": Taylor(1)})
    held = next(line for line in text.splitlines() if line.startswith("| hold"))
    assert held.count("–") == 3
    assert "nan" not in text
    assert "No latency was measured for hold_n5_b2" in text


def test_random_weights_have_latencies_and_no_quality(tmp_path: Path) -> None:
    text = measure(tmp_path, random_weights=True, quality=None, metrics={})
    header, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line]
    assert header == ["method", "N", "b", "latency ms/image", "cost in passes", "speed-up"]
    assert [row[:3] for row in rows] == [["vanilla", "5", "5"], ["vanilla", "3", "3"], ["hold", "5", "2"]]
    assert rows[0][5] == "1.00×"
    assert "Random weights: latency only" in text
    assert "images per row" not in text
    assert {path.name for path in tmp_path.iterdir()} == {"latency.json", "report.md", "report.json", "report.html"}
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Random weights: latency only" in page
    assert "data:image" not in page


def test_random_weights_yield_no_quality_even_where_there_are_metrics(tmp_path: Path) -> None:
    assert "count" not in measure(tmp_path, random_weights=True)


def test_few_images_are_warned_of_and_many_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "Fewer than 5,000 images" in measure(tmp_path)
    monkeypatch.setattr("lit_shortcut.report.document.FEW_IMAGES", 6)
    assert "Fewer" not in measure(tmp_path)


def test_rows_of_earlier_run_seeds_do_not_enter(tmp_path: Path) -> None:
    measure(tmp_path, run_seeds=[0, 1])
    assert "4 images per row and seed, 1 seed(s)" in measure(tmp_path, run_seeds=[0], num_images=4)


def test_quality_that_is_no_metric_is_refused_before_anything_is_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"quality must be one of the metrics \['count'\], got 'fid'"):
        measure(tmp_path, quality="fid")
    assert list(tmp_path.iterdir()) == []


def test_loggers_get_table_and_pictures(tmp_path: Path) -> None:
    measure(tmp_path / "results", logger=CSVLogger(tmp_path, name="logs"))
    found = {path.name for path in (tmp_path / "logs" / "version_0").iterdir()}
    assert {"report_table.csv", "report_grids_step0.png", "report_pareto_step0.png"} <= found


def test_trial_run_prints_the_table_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("lit_shortcut.callbacks.report.rank_zero_info", said.append)
    task = EvaluationTask(
        ToyBase(), decoding=Decoding(num_steps=5), rows=[(5,)], metrics={"count": Count()}, results=tmp_path
    )
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, fast_dev_run=True, callbacks=[Report("count")]
    )
    trainer.test(task, datamodule=ClassLabels(6, batch_size=4), verbose=False)
    assert list(tmp_path.iterdir()) == []
    assert any("| vanilla" in line and "4 images per row" in line and "nothing is written" in line for line in said)
