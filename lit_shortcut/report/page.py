"""The report as a page: one HTML file that needs no network."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio
from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from PIL import Image

from lit_shortcut.evaluation.rows import VANILLA
from lit_shortcut.report.plot import FAINT, front, legend_title, point_label, variant
from lit_shortcut.report.table import for_people, shown_passes

_THEME = "plotly_white"
_BUTTONS = ["toImage", "zoom2d", "pan2d", "resetScale2d"]  # others, such as sharing, need a network
_MOST_PIXELS = 128  # height of a strip; a page of photographs stays at a few MB
_LEAST_PIXELS = 64  # a strip of tiny images is magnified to this height


def page(
    table: pd.DataFrame,
    *,
    reference: str,
    quality: str | None,
    higher_is_better: bool,
    strips: Mapping[str, Path],
    prompts: Sequence[str] = (),
    notes: str = "",
    provenance: Mapping[str, object],
) -> str:
    """Return the report as HTML: plot, images of the clicked row beside vanilla's, sortable table, provenance.

    Args:
        table: made by :func:`~lit_shortcut.report.table.collect`.
        reference: name of the row that is shown beside the others.
        quality: the metric on the plot's vertical axis; without it, or without latencies, there is no plot.
        higher_is_better: whether a higher ``quality`` is better.
        strips: PNG file of each row's images side by side, at equal seeds.
        prompts: texts of the strips' columns.
        notes: text below the table, made by :func:`~lit_shortcut.report.document.notes`.
        provenance: facts about how the figures were made, by name.
    """
    pictures = {name: _data_uri(path) for name, path in strips.items()}
    heights = [_height(path) for path in strips.values()]
    height = min(max([*heights, _LEAST_PIXELS]), _MOST_PIXELS)
    shown = for_people(table)
    has_plot = quality is not None and {"latency_ms", quality} <= set(table.columns)
    figure = _figure(table, str(quality), higher_is_better=higher_is_better) if has_plot else None
    others = [name for name in table["name"] if name in pictures and name != reference]
    accelerated = [name for name in table.loc[table["method"] != VANILLA, "name"] if name in others]
    template = Environment(loader=PackageLoader("lit_shortcut.report", ""), autoescape=True).get_template("page.html")
    return template.render(
        title=f"{quality} against latency" if has_plot else "Vanilla and accelerated generation",
        figure=figure and Markup(_inline(figure)),  # noqa: S704 - plotly escapes what it is given
        pictures=pictures,
        labels={line["name"]: _label(line) for line in table.to_dict("records")},
        reference=reference,
        first=next(iter([*accelerated, *others]), None),
        height=height,
        pixelated=Markup(' class="pixelated"') if max(heights, default=0) < _LEAST_PIXELS else "",
        prompts=prompts,
        columns=list(shown.columns),
        rows=[
            {"name": name, "cells": cells}
            for name, cells in zip(table["name"], shown.itertuples(index=False, name=None), strict=True)
        ],
        notes=notes.splitlines(),
        provenance=provenance,
    )


def _inline(figure: go.Figure) -> str:
    """Return ``figure`` as a ``div`` of id ``plot``, with plotly.js."""
    config = {"responsive": True, "displaylogo": False, "modeBarButtons": [_BUTTONS]}
    text: str = figure.to_html(config, include_plotlyjs=True, full_html=False, div_id="plot", default_height="30rem")
    return text


def _figure(table: pd.DataFrame, metric: str, *, higher_is_better: bool) -> go.Figure:
    """Return ``metric`` against latency, with the lines of :func:`~lit_shortcut.report.plot.pareto`."""
    points = table.dropna(subset=["latency_ms", metric]).copy()
    points["hover"] = _hovers(points)
    figure, colours = go.Figure(), cycle(pio.templates[_THEME].layout.colorway)
    for name, lines in points.groupby("method", sort=False):
        best = lines["name"].isin(front(lines, metric, higher_is_better=higher_is_better))
        style: dict[str, Any] = {"legendgroup": str(name), "marker_color": next(colours)}
        figure.add_trace(_trace(lines[best], metric, name=_escaped(str(name)), mode="lines+markers+text", **style))
        if not best.all():
            style |= {"opacity": FAINT, "showlegend": False, "mode": "markers"}
            figure.add_trace(_trace(lines[~best], metric, **style))
    direction = "higher" if higher_is_better else "lower"
    figure.update_layout(
        template=_THEME,
        margin={"l": 70, "r": 20, "t": 60, "b": 60},
        hovermode="closest",
        hoverlabel={"align": "left", "bgcolor": "white"},
        xaxis_title_text="latency of the decoding loop, ms per image",
        yaxis_title_text=_escaped(f"{metric} ({direction} is better)"),
        legend={"title_text": "<br>".join(legend_title(table)), "orientation": "h", "y": 1.02, "yanchor": "bottom"},
    )
    return figure


def _trace(lines: pd.DataFrame, metric: str, **style: Any) -> go.Scatter:
    lines = lines.sort_values("latency_ms")
    return go.Scatter(
        x=lines["latency_ms"].tolist(),
        y=lines[metric].tolist(),
        error_y={"array": lines[f"{metric}_interval"].fillna(0).tolist(), "thickness": 1},
        customdata=lines["name"].tolist(),
        text=[point_label(line) for line in lines.to_dict("records")],
        textposition="top right",
        textfont_size=11,
        hovertext=lines["hover"].tolist(),
        hoverinfo="text",
        marker_size=9,
        **style,
    )


def _hovers(points: pd.DataFrame) -> list[str]:
    """Return the hover text of each row: its name and everything measured."""
    measured = for_people(points).drop(columns=["method", "N", "plan", "decoding"], errors="ignore")
    hovers = []
    for line, cells in zip(points.to_dict("records"), measured.to_dict("records"), strict=True):
        facts = {name: line[name] for name in ("plan", "decoding") if line[name]} | cells
        lines = [f"<b>{_escaped(_label(line))}</b>", *(_escaped(f"{name}: {value}") for name, value in facts.items())]
        hovers.append("<br>".join(lines))
    return hovers


def _label(line: Mapping[str, Any]) -> str:
    passes = "" if line["method"] == VANILLA else f", b = {shown_passes(line)}"
    return f"{variant(line)}, N = {line['N']}{passes}"


def _escaped(text: str) -> str:
    """Escape ``text`` for plotly, which knows no entities for quotes."""
    return html.escape(text, quote=False)


def _height(path: Path) -> int:
    with Image.open(path) as picture:
        return picture.height


def _data_uri(path: Path) -> str:
    """Return the PNG at ``path`` unchanged or, if it is higher than a page shows it, reduced to a JPEG."""
    with Image.open(path) as picture:
        if picture.height <= _MOST_PIXELS:
            return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
        smaller = picture.convert("RGB").resize((round(picture.width * _MOST_PIXELS / picture.height), _MOST_PIXELS))
    content = io.BytesIO()
    smaller.save(content, format="JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode()
