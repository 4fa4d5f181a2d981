from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import main, training_table
from benchmarks.systems import systems
from benchmarks.table import Table
from lit_shortcut.decoding.schedules import tokens_per_step

TABLES = ["tiny MaskGIT: decoding", "tiny MaskGIT: recording", "tiny MaskGIT: training", "tiny Lumina-DiMOO: decoding"]


def test_report_and_numbers_are_named_after_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.gpu.device_name", lambda device: "NVIDIA H100 80GB HBM3")
    main("tiny", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {f"nvidia-h100-80gb-hbm3.{end}" for end in ("md", "json")}
    report = (tmp_path / "nvidia-h100-80gb-hbm3.md").read_text()
    found = json.loads((tmp_path / "nvidia-h100-80gb-hbm3.json").read_text())
    assert found["machine"]["device"] == "NVIDIA H100 80GB HBM3"
    assert [table["title"] for table in found["tables"]] == TABLES
    assert all(f"### {title}" in report for title in TABLES)
    decoding, recording, training, _ = (table["rows"] for table in found["tables"])
    assert [row["N, b"] for row in decoding] == ["4, 4", "4, 2"]
    assert decoding[0]["speed-up"] == 1
    assert decoding[1]["speed-up"] == pytest.approx(decoding[0]["ms an image"] / decoding[1]["ms an image"])
    assert {row["what"] for row in recording} == {"sampling only", "recording bfloat16", "recording int8"}
    assert training[0]["batch"] == 1
    assert all(row["pairs/s"] > 0 for row in training)


def test_run_that_is_cut_leaves_the_tables_it_has_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(*system: object) -> Iterator[Table]:
        yield Table("measured", [{"pairs/s": 1.0}], "whole")
        raise KeyboardInterrupt

    monkeypatch.setattr("benchmarks.gpu.measure", cut)
    with pytest.raises(KeyboardInterrupt):
        main("tiny", tmp_path)
    report, numbers = sorted(tmp_path.iterdir(), key=lambda path: path.suffix, reverse=True)
    assert "### measured" in report.read_text()
    assert "weights random" in report.read_text()
    assert [table["title"] for table in json.loads(numbers.read_text())["tables"]] == ["measured"]


def test_training_that_never_fits_is_said_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*training: object) -> float:
        raise torch.OutOfMemoryError

    monkeypatch.setattr("benchmarks.gpu.pairs_per_second", full)
    size = systems("tiny")[0].training
    assert size is not None
    table = training_table("tiny", size, torch.device("cpu"), torch.float32)
    assert table.rows == [{"batch": 1, "pairs/s": None}]
    assert "Batch 1 does not fit in memory" in table.markdown()


def test_runs_of_the_paper_can_be_made_with_the_published_schedules() -> None:
    """Speed-ups stand in method's table: MaskGIT at batch 128, Lumina-DiMOO at batch 1."""
    maskgit, dimoo = systems("published")
    for system, num_tokens in ((maskgit, 1024), (dimoo, 4096)):
        for num_steps, budget in system.paper:
            assert sum(tokens_per_step(system.decoding.schedule, num_steps, num_tokens)) == num_tokens
            assert budget <= num_steps
    assert (maskgit.batch_size, maskgit.paper[15, 7]) == (128, 1.94)
    assert (dimoo.batch_size, dimoo.paper[64, 9]) == (1, 5.8)
