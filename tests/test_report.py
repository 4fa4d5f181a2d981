from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
from scipy import stats

from lit_shortcut.acceleration.accelerated import Accelerated
from lit_shortcut.acceleration.plans import Even
from lit_shortcut.acceleration.predictors import Hold
from lit_shortcut.evaluation import Results, Row
from lit_shortcut.report import (
    collect,
    dominated,
    grids,
    markdown,
    metric_names,
    pareto,
    pixels,
    read_captions,
    read_strips,
)

VANILLA, SHORT, HOLD = Row(8), Row(4), Row(8, Accelerated(Even(2), Hold()))
NAMES = ["vanilla_n8", "vanilla_n4", "hold_n8_b2"]
DISTANCES = {VANILLA: [6.0, 7.0, 8.0], SHORT: [9.0, 9.5, 10.0], HOLD: [8.0, 8.5, 9.0]}
LATENCIES = {"vanilla_n8": (80.0, 1.0), "vanilla_n4": (40.0, 0.5), "hold_n8_b2": (20.0, 0.25)}


@pytest.fixture(autouse=True)
def _closed_figures() -> Iterator[None]:
    yield
    plt.close("all")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Results of three rows at seeds 0, 1 and 2, with latencies."""
    results = Results(tmp_path)
    for row, values in DISTANCES.items():
        for seed, value in enumerate(values):
            facts = {"row": row.facts(), "num_images": 500}
            results.add(row, seed, facts, {"distance": value, "agreement": 0.5})
    measured: dict[str, dict[str, Any]] = {
        name: {"median_ms": ms, "iqr_ms": iqr, "speedup": 80 / ms} for name, (ms, iqr) in LATENCIES.items()
    }
    results.set_latency({}, measured)
    return tmp_path


@pytest.fixture
def table(folder: Path) -> pd.DataFrame:
    return collect(folder, NAMES, [0, 1, 2])


def test_table_has_a_line_a_row_with_means_and_intervals_over_seeds(table: pd.DataFrame) -> None:
    assert list(table["name"]) == NAMES
    assert list(table["method"]) == ["vanilla", "vanilla", "hold"]
    assert list(table["N"]) == [8, 4, 8]
    assert list(table["b"]) == [8, 4, 2]
    assert list(table["distance"]) == [7.0, 9.5, 8.5]
    assert list(table["speedup"]) == [1.0, 2.0, 4.0]
    assert set(table["seeds"]) == {3}
    assert set(table["images"]) == {500}
    low, high = stats.t.interval(0.95, df=2, loc=7.0, scale=stats.sem([6.0, 7.0, 8.0]))
    assert table["distance_interval"][0] == pytest.approx((high - low) / 2, rel=1e-5)
    assert metric_names(table) == ["distance", "agreement"]


def test_only_the_run_seeds_asked_for_count(folder: Path) -> None:
    one = collect(folder, NAMES, [2])
    assert list(one["distance"]) == [8.0, 10.0, 9.0]
    assert set(one["seeds"]) == {1}
    assert all(math.isnan(half) for half in one["distance_interval"])
    assert list(collect(folder, NAMES, [0, 1])["seeds"]) == [2, 2, 2]


def test_lines_keep_the_order_asked_for_and_rows_without_results_are_left_out(folder: Path) -> None:
    names = ["hold_n8_b2", "vanilla_n99", "vanilla_n8"]
    assert list(collect(folder, names, [0])["name"]) == ["hold_n8_b2", "vanilla_n8"]


def test_seed_12_is_not_taken_for_seed_1(folder: Path) -> None:
    Results(folder).add(VANILLA, 12, {"row": VANILLA.facts(), "num_images": 500}, {"distance": 99.0, "agreement": 0.0})
    assert collect(folder, ["vanilla_n8"], [1])["distance"][0] == 7.0


def test_markdown_says_latency_speed_up_and_interval(table: pd.DataFrame) -> None:
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown(table).splitlines()]
    assert lines[0] == ["method", "N", "b", "latency ms/image", "speed-up", "distance", "agreement"]
    assert lines[2] == ["vanilla", "8", "8", "80.0 (1.0)", "1.00×", "7.000 ± 2.484", "0.500 ± 0.000"]
    assert lines[4][:5] == ["hold", "8", "2", "20.0 (0.2)", "4.00×"]
    assert len(lines) == 5


def test_markdown_of_one_seed_without_latency_has_no_interval_and_no_latency(folder: Path) -> None:
    (folder / "latency.json").unlink()
    text = markdown(collect(folder, NAMES, [0]))
    assert "±" not in text
    assert "latency" not in text
    assert "nan" not in text


def test_higher_may_be_better(table: pd.DataFrame) -> None:
    assert dominated(table, "distance", higher_is_better=True) == [("hold_n8_b2", "vanilla_n8")]
    (axes,) = pareto(table, "distance", higher_is_better=True).axes
    assert axes.get_ylabel() == "distance (higher is better)"


def test_dominated_are_those_with_a_better_one_of_the_other_kind_at_no_more_latency(table: pd.DataFrame) -> None:
    assert dominated(table, "distance") == [("hold_n8_b2", "vanilla_n4")]
    table.loc[2, "latency_ms"] = 40.0
    assert dominated(table, "distance") == [("hold_n8_b2", "vanilla_n4")]  # equal latency suffices
    table.loc[2, "latency_ms"] = 41.0
    assert dominated(table, "distance") == []
    table.loc[2, "latency_ms"] = 90.0
    assert dominated(table, "distance") == [("vanilla_n8", "hold_n8_b2")]
    table.loc[2, "distance"] = table.loc[0, "distance"]
    assert dominated(table, "distance") == []  # an equal distance is not a lower one


def test_pareto_plot_has_a_line_a_method_ordered_by_latency(table: pd.DataFrame) -> None:
    (axes,) = pareto(table, "distance").axes
    lines = {container.get_label(): container.lines[0].get_xydata().tolist() for container in axes.containers}
    assert lines == {"vanilla": [[40.0, 9.5], [80.0, 7.0]], "hold": [[20.0, 8.5]]}
    assert {text.get_text() for text in axes.texts} == {"N=4", "N=8", "(8, 2)"}


def test_orders_of_one_method_are_told_apart(folder: Path) -> None:
    row = Row(8, order="halton")
    Results(folder).add(row, 0, {"row": row.facts(), "num_images": 500}, {"distance": 5.0, "agreement": 0.5})
    latency = json.loads((folder / "latency.json").read_text())
    latency["measured"][row.name] = {"median_ms": 30.0, "iqr_ms": 1.0, "speedup": 80 / 30}
    (folder / "latency.json").write_text(json.dumps(latency))
    table = collect(folder, [*NAMES, row.name], [0])
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown(table).splitlines()]
    assert [line[3] for line in lines] == ["order", lines[1][3], "", "", "", "halton"]
    (axes,) = pareto(table, "distance").axes
    assert [container.get_label() for container in axes.containers] == ["vanilla", "hold", "vanilla halton"]


def test_pareto_plot_of_an_unknown_metric_names_those_there_are(table: pd.DataFrame) -> None:
    with pytest.raises(ValueError, match=r"one of \['distance', 'agreement'\], got 'fid'"):
        pareto(table, "fid")


def test_pixels_are_those_of_the_figure() -> None:
    figure = plt.figure(figsize=(3, 2), dpi=50, facecolor=(1.0, 0.0, 0.0))
    picture = pixels(figure)
    assert picture.dtype == torch.uint8
    assert picture.shape == (3, 100, 150)
    assert bool((picture == torch.tensor([255, 0, 0])[:, None, None]).all())
    assert not plt.get_fignums()


def test_grid_shows_each_strip_with_its_name() -> None:
    strips = {"vanilla_n8": torch.full((3, 10, 40), 255, dtype=torch.uint8), "hold_n8_b2": torch.zeros(3, 10, 40)}
    figure = grids(strips)
    assert [axis.get_ylabel() for axis in figure.axes] == ["vanilla n8", "hold n8 b2"]


def test_grid_of_one_row_with_one_image_works(tmp_path: Path) -> None:
    Results(tmp_path).add_images(VANILLA, torch.full((1, 3, 8, 8), 128, dtype=torch.uint8))
    strips = read_strips(tmp_path, NAMES)
    assert list(strips) == ["vanilla_n8"]
    picture = pixels(grids(strips))
    assert bool((picture == 128).all(0).any())


def test_prompts_stand_under_the_columns_of_the_grid(tmp_path: Path) -> None:
    images = torch.zeros(3, 3, 8, 8, dtype=torch.uint8)
    results = Results(tmp_path)
    assert read_captions(tmp_path) == []
    results.add_images(VANILLA, images, ("a coat", "a very wide and dark coat " * 4, "größer"))
    results.add_images(HOLD, images)
    captions = read_captions(tmp_path)
    assert captions == ["a coat", "a very wide and dark coat " * 4, "größer"]
    figure = grids(read_strips(tmp_path, NAMES), captions)
    assert [[text.get_text().split()[-1] for text in axis.texts] for axis in figure.axes] == [
        [],
        ["coat", "coat", "größer"],
    ]
    places = [text.get_position()[0] for text in figure.axes[-1].texts]
    assert places == pytest.approx([1 / 6, 3 / 6, 5 / 6])
