"""Finished rows to a Markdown table, a Pareto plot and image grids."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import torch
import torchvision
from matplotlib.figure import Figure
from torch import Tensor

from lit_shortcut.metrics.functional import mean_interval


def collect(folder: Path, names: list[str], seeds: list[int]) -> pd.DataFrame:
    """One line for each of the rows ``names``, in that order, with means and 95 % intervals over run ``seeds``.

    Columns: ``method``, ``N``, ``b``, ``order`` (empty where a row has none of its own), ``images``, ``seeds``,
    ``latency_ms``, ``latency_iqr_ms``, ``speedup`` (where latency was measured), and for each metric its mean under its
    name and half an interval under ``<name>_interval`` (NaN with one seed). Rows without any result are left out.
    """
    latencies = _latencies(folder)
    lines = []
    for name in names:
        paths = [folder / "rows" / f"{name}_seed{seed}.json" for seed in seeds]
        results = [json.loads(path.read_text()) for path in paths if path.exists()]
        if not results:
            continue
        line = _identity(name, results[0]["facts"]["row"])
        line |= {"images": results[0]["facts"]["num_images"], "seeds": len(results)}
        if name in latencies:
            line |= latencies[name]
        for metric in results[0]["values"]:
            line[metric], line[f"{metric}_interval"] = mean_interval([r["values"][metric] for r in results])
        lines.append(line)
    return pd.DataFrame(lines)


def collect_latencies(folder: Path) -> pd.DataFrame:
    """One line for each row whose latency was measured: the columns of :func:`collect` up to ``speedup``, no metric."""
    latency = _stored(folder)
    rows = dict(zip(latency["measured"], (facts["row"] for facts in latency["facts"]["rows"]), strict=True))
    return pd.DataFrame([_identity(name, rows[name]) | line for name, line in _latencies(folder).items()])


def _identity(name: str, row: dict[str, Any]) -> dict[str, Any]:
    order = row.get("order", "")
    return {"name": name, "method": row["method"], "N": row["num_steps"], "b": row["budget"], "order": order}


def _latencies(folder: Path) -> dict[str, dict[str, float]]:
    return {
        name: {"latency_ms": found["median_ms"], "latency_iqr_ms": found["iqr_ms"], "speedup": found["speedup"]}
        for name, found in _stored(folder)["measured"].items()
    }


def _stored(folder: Path) -> dict[str, Any]:
    path = folder / "latency.json"
    stored: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"measured": {}}
    return stored


def metric_names(table: pd.DataFrame) -> list[str]:
    """Metrics of a table made by :func:`collect`, in order."""
    return [name for name in table.columns if f"{name}_interval" in table.columns]


def markdown(table: pd.DataFrame) -> str:
    """``table`` for people: units in the header, intervals behind ±, and a dash where nothing was measured."""
    shown = table[["method", "N", "b"] + ["order"] * bool(table["order"].any())].copy()
    if "latency_ms" in table:
        shown["latency ms/image"] = [
            f"{ms:.1f} ({iqr:.1f})" for ms, iqr in zip(table["latency_ms"], table["latency_iqr_ms"], strict=True)
        ]
        shown["speed-up"] = [f"{ratio:.2f}×" for ratio in table["speedup"]]
    for name in metric_names(table):
        shown[name] = [
            f"{mean:.3f}" if pd.isna(half) else f"{mean:.3f} ± {half:.3f}"
            for mean, half in zip(table[name], table[f"{name}_interval"], strict=True)
        ]
    text: str = shown.to_markdown(index=False, disable_numparse=True)
    return text


def dominated(table: pd.DataFrame, metric: str, *, higher_is_better: bool = False) -> list[tuple[str, str]]:
    """Pairs (winner, loser) of row names: better ``metric`` at lower or equal latency. Vanilla against accelerated."""
    sign = -1 if higher_is_better else 1
    pairs = []
    for _, winner in table.iterrows():
        for _, loser in table.iterrows():
            crosses = (winner["method"] == "vanilla") != (loser["method"] == "vanilla")
            if crosses and sign * winner[metric] < sign * loser[metric] and winner["latency_ms"] <= loser["latency_ms"]:
                pairs.append((winner["name"], loser["name"]))
    return pairs


def pareto(table: pd.DataFrame, metric: str, *, higher_is_better: bool = False) -> Figure:
    """``metric`` against latency, a line per method and order, with intervals over seeds.

    Raises:
        ValueError: if ``table`` has no such metric.
    """
    if metric not in metric_names(table):
        raise ValueError(f"the plot's metric must be one of {metric_names(table)}, got {metric!r}")
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    corners = cycle([(5, 5, "left"), (-5, -12, "right"), (-5, 5, "right"), (5, -12, "left")])  # points; line by line
    for (method, order), lines in table.groupby(["method", "order"], sort=False):
        ordered = lines.sort_values("latency_ms")
        x, y, side = next(corners)
        drawn = axes.errorbar(
            ordered["latency_ms"],
            ordered[metric],
            yerr=ordered[f"{metric}_interval"].fillna(0),
            marker="o",
            capsize=3,
            label=f"{method} {order}".strip(),
        )
        for _, line in ordered.iterrows():
            label = f"N={line['N']}" if method == "vanilla" else f"({line['N']}, {line['b']})"
            axes.annotate(
                label,
                (line["latency_ms"], line[metric]),
                textcoords="offset points",
                xytext=(x, y),
                ha=side,
                fontsize=8,
                color=drawn[0].get_color(),
            )
    axes.margins(x=0.08)
    axes.set_xlabel("latency of the decoding loop, ms per image")
    axes.set_ylabel(f"{metric} ({'higher' if higher_is_better else 'lower'} is better)")
    axes.legend(title="at a point: N or (N, b)")
    axes.grid(alpha=0.3)
    return figure


def grids(images: dict[str, Tensor], captions: Sequence[str] = ()) -> Figure:
    """Strips of images under one another, each with its name at the left; columns share seed and condition.

    ``images`` maps a row's name to uint8 (3, H, W), as :func:`torchvision.utils.make_grid` lays them out. ``captions``,
    one a column, stand under the last strip.
    """
    captions = [textwrap.fill(caption, width=max(8, 150 // len(captions))) for caption in captions]
    room = 0.15 * max((caption.count("\n") + 1 for caption in captions), default=0)  # inches
    across = 10.2  # inches that a strip takes of the figure's 12
    heights = [max(0.3, across * strip.shape[1] / strip.shape[2]) for strip in images.values()]
    height = sum(heights) + 0.06 * len(heights) + 0.2 + room
    figure, axes = plt.subplots(
        len(images), 1, figsize=(12, height), squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    figure.subplots_adjust(left=0.145, right=0.995, top=1 - 0.1 / height, bottom=(0.1 + room) / height, hspace=0.06)
    for axis, (name, strip) in zip(axes[:, 0], images.items(), strict=True):
        axis.imshow(strip.permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_ylabel(name.replace("_", " "), rotation=0, ha="right", va="center", fontsize=9)
    for column, caption in enumerate(captions):
        place = (column + 0.5) / len(captions)
        axes[-1, 0].text(
            place, -0.04, caption, transform=axes[-1, 0].transAxes, ha="center", va="top", fontsize=8, linespacing=1.1
        )
    return figure


def read_strips(folder: Path, names: list[str]) -> dict[str, Tensor]:
    """The strips of images stored for the rows ``names``, uint8 (3, H, W) each."""
    paths = {name: folder / "images" / f"{name}.png" for name in names}
    mode = torchvision.io.ImageReadMode.RGB
    return {name: torchvision.io.read_image(str(path), mode) for name, path in paths.items() if path.exists()}


def read_captions(folder: Path) -> list[str]:
    """Prompts of the stored strips' columns; none where classes were asked for."""
    path = folder / "images" / "prompts.json"
    return list(json.loads(path.read_text())) if path.exists() else []


def pixels(figure: Figure) -> Tensor:
    """``figure`` as uint8 (3, H, W), and closed."""
    figure.canvas.draw()
    rgba = torch.frombuffer(bytearray(figure.canvas.buffer_rgba()), dtype=torch.uint8)  # type: ignore[attr-defined]
    width, height = figure.canvas.get_width_height()
    plt.close(figure)
    return rgba.view(height, width, 4)[..., :3].permute(2, 0, 1).contiguous()
