from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from lit_shortcut.bases.toy import ToyBase
from lit_shortcut.contracts import Conditions
from lit_shortcut.evaluation import timing
from lit_shortcut.evaluation.rows import build_rows
from lit_shortcut.metrics.latency import Latency
from lit_shortcut.sampling import Decoding


def test_cost_is_in_base_passes_of_the_same_round(monkeypatch: pytest.MonkeyPatch) -> None:
    base, asked = ToyBase(), dict[str, int]()
    features = base.features

    def counted(*arguments: Any) -> Any:
        asked["passes"] = asked.get("passes", 0) + 1
        return features(*arguments)

    def measured(runs: Mapping[str, Callable[[], object]], *_: Any, **__: Any) -> dict[str, Latency]:
        row, unit = runs
        runs[unit]()
        times = {row: [10.0, 60.0, 11.0], unit: [8.0, 40.0, 8.0]}  # the second round was slow
        return {name: Latency(11.0, 1.0, 3, 2, "a CPU", own) for name, own in times.items()}

    monkeypatch.setattr(base, "features", counted)
    monkeypatch.setattr(timing, "measure_latency", measured)
    decoding, ids = Decoding(num_steps=5), torch.arange(2)
    rows = build_rows([[5]], decoding, {})
    (found,) = timing.time_rows(base, rows, decoding, Conditions(ids, ids, ids), 3).values()
    assert found["passes"] == pytest.approx(11 / 8 * asked["passes"])
