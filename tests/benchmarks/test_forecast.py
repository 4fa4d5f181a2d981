from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.forecast import LiveMemory, forecast
from lit_shortcut.acceleration.predictors import Hold
from lit_shortcut.acceleration.shortcut import Shortcut
from lit_shortcut.bases.dimoo.adapter import DiMOO
from lit_shortcut.bases.dimoo.published import random_weights
from lit_shortcut.networks.llada_shortcut import LLaDAShortcutNet
from lit_shortcut.sampling import Decoding
from tests.command_line import CONFIGS

DECODING = Decoding(6, schedule="cosine_left", guidance=4.0)


def base(depth: int, device: str = "meta") -> DiMOO:
    small: dict[str, Any] = {"height": 64, "width": 64, "feature_width": 16, "num_heads": 2, "mlp_width": 32}
    return random_weights(depth, device=device, dtype="float32", **small)


def counted(depth: int, predictor: Any, folder: Path) -> dict[str, Any]:
    return forecast(base(depth), predictor, [3, 1], "a cat", DECODING, folder / "forecast.json")


def test_operations_are_those_of_full_and_predicted_passes(tmp_path: Path) -> None:
    runs = {depth: counted(depth, Hold(), tmp_path)["runs"] for depth in (1, 2, 6)}
    assert [(run["method"], run["budget"]) for run in runs[6]] == [("vanilla", 6), ("hold", 3), ("hold", 1)]
    for one, two, six in zip(runs[1], runs[2], runs[6], strict=True):
        layer = two["operations"] - one["operations"]
        assert six["operations"] == one["operations"] + 5 * layer
        assert layer * 6 == (runs[2][0]["operations"] - runs[1][0]["operations"]) * one["budget"]


def test_memory_is_that_of_the_weights_and_the_largest_activations(tmp_path: Path) -> None:
    network = LLaDAShortcutNet(16, num_heads=2, mlp_width=32)
    memory = counted(9, Shortcut(network), tmp_path)["memory_bytes"]
    assert memory["base"] == 4 * sum(tensor.numel() for tensor in base(9, "cpu").transformer.state_dict().values())
    assert memory["predictor"] == 4 * sum(tensor.numel() for tensor in network.state_dict().values())
    assert 4 * 2 * 16 * 8192 < memory["activations"] < 10 * 4 * 2 * 16 * 8192  # logits of both branches are the largest


def test_memory_of_views_is_that_of_what_they_show_and_memory_of_the_dead_is_free() -> None:
    weights = torch.zeros(100)
    with LiveMemory() as memory:
        view = weights.view(10, 10).T
        assert (memory.live, memory.peak) == (0, 0)
        doubled = view * 2
        flat = doubled.flatten()  # a copy: doubled is no longer contiguous
        assert memory.live == 800
        del doubled
        part = flat[:3]
        del flat
        assert memory.live == 400
        del part
        assert (memory.live, memory.peak) == (0, 800)


def test_base_with_weights_and_budget_outside_are_refused() -> None:
    with pytest.raises(ValueError, match="meta device"):
        forecast(base(1, "cpu"), Hold(), [2], "a cat", DECODING)
    with pytest.raises(ValueError, match=r"budgets must lie in 1\.\.6.*got 7"):
        forecast(base(1), Hold(), [2, 7], "a cat", DECODING)


def test_configuration_of_the_published_size_runs(tmp_path: Path) -> None:
    words = ["--base.init_args.depth=1", "--decoding.num_steps=14", f"--path={tmp_path / 'forecast.json'}"]
    command = [sys.executable, "-m", "benchmarks.forecast", "--config", "benchmarks/forecast.yaml", *words]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, cwd=CONFIGS.parent).stdout
    found = json.loads((tmp_path / "forecast.json").read_text())
    vanilla, same, *_ = found["runs"]
    assert vanilla["operations"] == same["operations"] > found["runs"][-1]["operations"]
    assert [run["budget"] for run in found["runs"]] == [14, 14, 11, 9]
    assert "| shortcut | 9 " in printed
