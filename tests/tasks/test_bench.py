from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from datamodules.conditions import ClassLabels
from lit_shortcut.acceleration.predictors import Hold
from lit_shortcut.acceleration.shortcut import Shortcut
from lit_shortcut.bases.toy import ToyBase
from lit_shortcut.networks.shortcut import ShortcutNet
from lit_shortcut.tasks.bench import BenchTask


def bench(folder: Path, rows: list[Any], precision: Any = "32-true", **arguments: Any) -> dict[str, Any]:
    settings = {"path": folder / "bench.json", "rounds": 2, "methods": {"hold": Hold()}}
    task = BenchTask(ToyBase(), rows=rows, **(settings | arguments))
    quiet: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    trainer = L.Trainer(**quiet, precision=precision)
    trainer.test(task, datamodule=ClassLabels(6, batch_size=3), verbose=False)
    content: dict[str, Any] = json.loads((folder / "bench.json").read_text())
    return content


def most_memory_mb() -> float:
    """What this process has had at most, as the kernel says in kB of 1,024 bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e6


def test_parts_of_every_row_make_up_the_whole(tmp_path: Path) -> None:
    rows = bench(tmp_path, [[5], [5, 2, "hold", {"order": "halton"}]])["rows"]
    assert rows.keys() == {"vanilla_n5", "hold_n5_b2_halton"}
    calls = {name: {part["name"]: part["calls"] for part in parts} for name, parts in rows.items()}
    assert calls["vanilla_n5"] == {"base": 5, "head": 5, "token choice": 5, "rest": 0}
    assert calls["hold_n5_b2_halton"] == {"base": 2, "hold": 3, "head": 5, "token choice": 5, "rest": 0}
    for parts in rows.values():
        assert sum(part["share"] for part in parts) == pytest.approx(1)  # a median of two is their mean
        assert all(part["ms"] > 0 for part in parts)


def test_facts_say_what_the_figures_depend_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("lit_shortcut.tasks.bench.rank_zero_info", said.append)
    methods = {"shortcut": Shortcut(ShortcutNet(width=16, num_heads=2))}
    facts = bench(tmp_path, [[5, 2, "shortcut"]], methods=methods, precision="bf16-true", random_weights=True)["facts"]
    assert (facts["weights"], facts["dtype"], facts["precision"]) == ("random", "bfloat16", "bf16-true")
    assert (facts["batch"], facts["rounds"], facts["threads"]) == (3, 2, torch.get_num_threads())
    assert facts["torch"] == torch.__version__
    assert facts["peak_memory_mb"] == pytest.approx(most_memory_mb(), rel=0.05)
    text = "\n".join(said)
    for shown in ("shortcut_n5_b2", "| token choice", "weights random", "batch 3", str(tmp_path / "bench.json")):
        assert shown in text


def test_trained_weights_are_not_called_random(tmp_path: Path) -> None:
    assert bench(tmp_path, [[3]])["facts"]["weights"] == "trained"


def test_row_that_cannot_be_run_is_refused_before_any_is(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"budget must lie in 1\.\.5.*got 6"):
        bench(tmp_path, [[5], [5, 6, "hold"]])
    assert list(tmp_path.iterdir()) == []


def test_rounds_must_be_positive() -> None:
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        BenchTask(ToyBase(), rows=[[3]], rounds=0)


def test_trial_run_writes_nothing(tmp_path: Path) -> None:
    task = BenchTask(ToyBase(), rows=[[3]], path=tmp_path / "bench.json", rounds=1)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, fast_dev_run=True)
    trainer.test(task, datamodule=ClassLabels(6, batch_size=3), verbose=False)
    assert list(tmp_path.iterdir()) == []
