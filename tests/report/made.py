"""Results made by hand: three rows at seeds 0, 1 and 2, with latencies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import torch

from lit_shortcut.acceleration.plans import Even
from lit_shortcut.acceleration.predictors import Hold
from lit_shortcut.contracts import Conditions
from lit_shortcut.evaluation.results import Results
from lit_shortcut.evaluation.rows import Row, build_rows
from lit_shortcut.report.table import collect
from lit_shortcut.sampling import Decoding

IDENTITY = {"conditions": {"num_images": 500}}


def conditions(*prompts: str, first_seed: int = 0) -> Conditions:
    """Conditions of as many images as there are prompts."""
    ids = torch.arange(len(prompts))
    return Conditions(ids, ids + first_seed, ids, prompts)


def row(*entry: Any) -> Row:
    (built,) = build_rows([entry], Decoding(num_steps=8), {"hold": Hold()}, {"adaptive": Even})
    return built


VANILLA, SHORT, HOLD = row(8), row(4), row(8, 2, "hold")
ROWS = [VANILLA, SHORT, HOLD]
DISTANCES = {VANILLA.name: [6.0, 7.0, 8.0], SHORT.name: [9.0, 9.5, 10.0], HOLD.name: [8.0, 8.5, 9.0]}
LATENCIES = {VANILLA.name: (80.0, 1.0), SHORT.name: (40.0, 0.5), HOLD.name: (20.0, 0.25)}


def timed(ms: float, iqr: float) -> dict[str, Any]:
    return {"median_ms": ms, "iqr_ms": iqr, "passes": ms / 10, "round_ms": [ms - iqr, ms, ms + iqr]}


def add(results: Results, one: Row, seed: int, distance: float, passes: dict[str, float] | None = None) -> None:
    every = dict.fromkeys(("mean", "low", "high"), float(one.budget))
    results.add(one, seed, IDENTITY, {"distance": distance, "agreement": 0.5}, passes or every)


def make(folder: Path) -> Results:
    results = Results(folder)
    for one in ROWS:
        for seed, value in enumerate(DISTANCES[one.name]):
            add(results, one, seed, value)
    set_latencies(results, LATENCIES)
    return results


def set_latencies(results: Results, latencies: dict[str, tuple[float, float]]) -> None:
    measured = {name: timed(*both) for name, both in latencies.items()}
    results.set_latency({"rows": {name: {"base": 1} for name in latencies}}, measured)


def collected(results: Results, rows: list[Row], seeds: list[int], changed: tuple[str, ...] = ()) -> pd.DataFrame:
    """The table where the loops of the rows ``changed`` are others than those that were timed."""
    loops = {one.name: {"base": 2 if one.name in changed else 1} for one in rows}
    return collect(results, rows, seeds, loops, VANILLA.name)
