"""Quality against latency."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import cycle
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter
from torch import Tensor

from lit_shortcut.evaluation.rows import EVEN, VANILLA
from lit_shortcut.report.table import metric_names, shown_passes

FAINT = 0.35
_OWN_DECODING = "*"
_OPPOSITE = {  # offsets of labels in points, and the ones across
    (5, 5, "left"): (-5, -12, "right"),
    (-5, -12, "right"): (5, 5, "left"),
    (-5, 5, "right"): (5, -12, "left"),
    (5, -12, "left"): (-5, 5, "right"),
}


def pareto(table: pd.DataFrame, metric: str, *, higher_is_better: bool) -> Figure:
    """Plot ``metric`` against latency, with intervals over seeds.

    Each method has a line through the best of its points, whatever their plan and decoding: those that none of its
    others beats in both. The others are faint.

    Raises:
        ValueError: if ``table`` has no such metric.
    """
    if metric not in metric_names(table):
        raise ValueError(f"the plot's metric must be one of {metric_names(table)}, got {metric!r}")
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    corners = cycle(_OPPOSITE)
    colours = cycle(plt.rcParams["axes.prop_cycle"].by_key()["color"])
    for name, lines in table.dropna(subset=["latency_ms", metric]).groupby("method", sort=False):
        best = front(lines, metric, higher_is_better=higher_is_better)
        colour, corner = next(colours), next(corners)
        _draw(axes, lines[lines["name"].isin(best)], metric, colour, corner, str(name))
        _draw(axes, lines[~lines["name"].isin(best)], metric, colour, corner, "")
    axes.set_xscale("log")  # equal distances are equal speed-ups
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.margins(x=0.15)
    axes.set_xlabel("latency of the decoding loop, ms per image")
    axes.set_ylabel(f"{metric} ({'higher' if higher_is_better else 'lower'} is better)", parse_math=False)
    legend = axes.legend(title="\n".join(legend_title(table)))
    for text in legend.get_texts():
        text.set_parse_math(False)
    axes.grid(alpha=0.3)
    return figure


def legend_title(table: pd.DataFrame) -> list[str]:
    """Return the lines that explain what :func:`point_label` writes for the rows of ``table``."""
    starred = [f"{_OWN_DECODING}: another decoding (see the table)"] if table["decoding"].any() else []
    return ["at a point: N or (N, base passes)", *starred]


def point_label(line: Mapping[Any, Any]) -> str:
    """Return the label of a point: N for vanilla, else N and base passes; then a star for a decoding of its own."""
    star = _OWN_DECODING if line["decoding"] else ""
    if line["method"] == VANILLA:
        return f"N={line['N']}{star}"
    return f"({line['N']}, {shown_passes(line)}){star}"


def variant(line: Mapping[Any, Any]) -> str:
    """Return method, plan if it is not the even one, and decoding if the row has its own."""
    plan = "" if line["plan"] == EVEN else line["plan"]
    return " ".join(part for part in (line["method"], plan, line["decoding"]) if part)


def front(lines: pd.DataFrame, metric: str, *, higher_is_better: bool) -> list[str]:
    """Return the names of the rows that no other row beats at equal or lower latency, fastest first."""
    sign, names, best = -1 if higher_is_better else 1, [], float("inf")
    for _, line in lines.assign(_rank=sign * lines[metric]).sort_values(["latency_ms", "_rank"]).iterrows():
        if sign * line[metric] < best:
            names.append(line["name"])
            best = sign * line[metric]
    return names


def _draw(axes: Axes, lines: pd.DataFrame, metric: str, colour: str, corner: tuple[int, int, str], label: str) -> None:
    """Draw points, joined by a line if they have a ``label``, else faint."""
    if lines.empty:
        return
    lines, alpha = lines.sort_values("latency_ms"), 1.0 if label else FAINT
    corners = cycle([corner, _OPPOSITE[corner]])  # neighbours on a line lie close together
    axes.errorbar(
        lines["latency_ms"],
        lines[metric],
        yerr=lines[f"{metric}_interval"].fillna(0),
        fmt="o-" if label else "o",
        capsize=3,
        color=colour,
        alpha=alpha,
        label=label or "_others",
    )
    for (_, line), (x, y, side) in zip(lines.iterrows(), corners, strict=False):
        axes.annotate(
            point_label(line),
            (line["latency_ms"], line[metric]),
            textcoords="offset points",
            xytext=(x, y),
            ha=side,
            fontsize=8,
            color=colour,
            alpha=alpha,
            parse_math=False,
        )


def pixels(figure: Figure) -> Tensor:
    """Return ``figure`` as uint8 (3, H, W), and close it."""
    figure.canvas.draw()
    rgba = torch.frombuffer(bytearray(figure.canvas.buffer_rgba()), dtype=torch.uint8)  # type: ignore[attr-defined]
    width, height = figure.canvas.get_width_height()
    plt.close(figure)
    return rgba.view(height, width, 4)[..., :3].permute(2, 0, 1).contiguous()
