from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import main, training_table
from benchmarks.systems import systems
from benchmarks.table import Table
from lit_shortcut.acceleration.replay import RecordedEnds
from lit_shortcut.decoding.schedules import tokens_per_step
from lit_shortcut.tasks.recording import record
from lit_shortcut.tasks.shortcut import ShortcutTask

MEASURED = ("decoding", "recording", "training")


def test_report_and_numbers_are_named_after_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.gpu.device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr("benchmarks.gpu._LARGEST_BATCH", 4)
    main("tiny", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {f"nvidia-h100-80gb-hbm3.{end}" for end in ("md", "json")}
    report = (tmp_path / "nvidia-h100-80gb-hbm3.md").read_text()
    found = json.loads((tmp_path / "nvidia-h100-80gb-hbm3.json").read_text())
    assert found["machine"]["device"] == "NVIDIA H100 80GB HBM3"
    assert [table["title"] for table in found["tables"]] == [
        f"{system}: {part}" for system in ("tiny MaskGIT", "tiny Lumina-DiMOO") for part in MEASURED
    ]
    for decoding, recording, training in (found["tables"][:3], found["tables"][3:]):
        assert all(f"### {table['title']}" in report for table in (decoding, recording, training))
        vanilla, accelerated = decoding["rows"]
        assert (vanilla["N, b"], accelerated["N, b"], vanilla["speed-up"]) == ("4, 4", "4, 2", 1)
        assert accelerated["speed-up"] == pytest.approx(vanilla["ms an image"] / accelerated["ms an image"])
        assert [row["what"] for row in recording["rows"]] == ["sampling only", "recording bfloat16", "recording int8"]
        assert [row["batch"] for row in training["rows"]] == [1, 2, 4]
        assert all(row["pairs/s"] > 0 for row in training["rows"])


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
    system = systems("tiny")[0]
    base, task = system.base(torch.device("cpu")), ShortcutTask(system.network())
    task.use(RecordedEnds(base.spec, base.interface, "random"))
    trajectories = record(base, system.conditions(1), system.decoding)
    table = training_table("tiny", task, trajectories, torch.device("cpu"), torch.float32)
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
