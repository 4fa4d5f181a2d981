from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch

from lit_shortcut.evaluation.results import Results
from lit_shortcut.report.grids import grids, read_strips, strip_paths
from lit_shortcut.report.plot import front, pareto, pixels
from tests.report.made import (
    HOLD,
    LATENCIES,
    ROWS,
    SHORT,
    VANILLA,
    add,
    collected,
    conditions,
    make,
    row,
    set_latencies,
)

DOLLARS = 'signs "$5" and "$10" \\frac{1 $x^$'


@pytest.fixture(autouse=True)
def _closed_figures() -> Iterator[None]:
    yield
    plt.close("all")


@pytest.fixture
def results(tmp_path: Path) -> Results:
    return make(tmp_path)


@pytest.fixture
def table(results: Results) -> pd.DataFrame:
    return collected(results, ROWS, [0, 1, 2])


# ---- quality against latency


def test_plot_has_a_line_a_method_ordered_by_latency(table: pd.DataFrame) -> None:
    (axes,) = pareto(table, "distance", higher_is_better=False).axes
    lines = {container.get_label(): container.lines[0].get_xydata().tolist() for container in axes.containers}
    assert lines == {"vanilla": [[40.0, 9.5], [80.0, 7.0]], "hold": [[20.0, 8.5]]}
    assert {text.get_text() for text in axes.texts} == {"N=4", "N=8", "(8, 2)"}
    assert "*" not in axes.get_legend().get_title().get_text()


def test_line_goes_through_the_points_that_no_other_beats_and_the_rest_are_faint(results: Results) -> None:
    slow, worse = row(8, 6, "hold"), row(8, 5, "hold")
    for one, distance in ((slow, 6.0), (worse, 9.0)):
        add(results, one, 0, distance)
    set_latencies(results, LATENCIES | {slow.name: (60.0, 1.0), worse.name: (50.0, 1.0)})
    table = collected(results, [*ROWS, slow, worse], [0])
    held = table[table["method"] == "hold"]
    assert front(held, "distance", higher_is_better=False) == [HOLD.name, slow.name]
    assert front(held, "distance", higher_is_better=True) == [HOLD.name, worse.name]
    (axes,) = pareto(table, "distance", higher_is_better=False).axes
    by_label = {container.get_label(): container.lines[0] for container in axes.containers}
    assert by_label["hold"].get_xydata().tolist() == [[20.0, 8.0], [60.0, 6.0]]
    assert by_label["_others"].get_xydata().tolist() == [[50.0, 9.0]]
    assert by_label["_others"].get_alpha() < 1
    assert by_label["_others"].get_linestyle() == "None"


def test_plans_and_decodings_of_one_method_share_its_line(results: Results) -> None:
    halton, adaptive = row(8, {"order": "halton"}), row(8, 2, "hold", "adaptive")
    add(results, halton, 0, 5.0)
    add(results, adaptive, 0, 5.0, {"mean": 2.5, "low": 1, "high": 4})
    set_latencies(results, LATENCIES | {halton.name: (30.0, 1.0), adaptive.name: (30.0, 1.0)})
    (axes,) = pareto(collected(results, [*ROWS, halton, adaptive], [0]), "distance", higher_is_better=False).axes
    labels = [container.get_label() for container in axes.containers]
    assert labels == ["vanilla", "_others", "hold"]
    texts = {text.get_text() for text in axes.texts}
    assert texts == {"N=4", "N=8", "N=8*", "(8, 2)", "(8, 2.5 (1–4))"}
    assert "*: another decoding" in axes.get_legend().get_title().get_text()


def test_row_without_latency_is_no_point(results: Results) -> None:
    (axes,) = pareto(collected(results, ROWS, [0], changed=(HOLD.name,)), "distance", higher_is_better=False).axes
    assert [container.get_label() for container in axes.containers] == ["vanilla"]


def test_direction_stands_at_the_axis(table: pd.DataFrame) -> None:
    (axes,) = pareto(table, "distance", higher_is_better=True).axes
    assert axes.get_ylabel() == "distance (higher is better)"


def test_plot_of_an_unknown_metric_names_those_there_are(table: pd.DataFrame) -> None:
    with pytest.raises(ValueError, match=r"\['distance', 'agreement'\].*'fid'"):
        pareto(table, "fid", higher_is_better=False)


def test_metric_of_any_name_is_drawn(table: pd.DataFrame) -> None:
    named = table.rename(columns={"distance": DOLLARS, "distance_interval": f"{DOLLARS}_interval"})
    named["method"] = [f"{DOLLARS} {method}" for method in named["method"]]
    assert pixels(pareto(named, DOLLARS, higher_is_better=False)).float().std() > 1


# ---- grids


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


def test_long_name_of_a_row_stays_within_the_grid() -> None:
    name = "shortcut_wide_n16_b4_early_confidence_noise40_halton_rolled"
    figure = grids({name: torch.zeros(3, 10, 40, dtype=torch.uint8)})
    figure.canvas.draw()
    label = figure.axes[0].yaxis.label
    assert label.get_text().replace("\n", " ") == name.replace("_", " ")
    assert label.get_window_extent().x0 >= 0


def test_grid_of_one_row_with_one_image_works(tmp_path: Path) -> None:
    results = Results(tmp_path)
    results.add_images(VANILLA, torch.full((1, 3, 8, 8), 128, dtype=torch.uint8), conditions("a coat"))
    strips = read_strips(strip_paths(results, ROWS, VANILLA))
    assert list(strips) == ["vanilla_n8"]
    assert bool((pixels(grids(strips)) == 128).all(0).any())


def test_prompts_stand_under_the_columns_of_the_grid(tmp_path: Path) -> None:
    images = torch.zeros(3, 3, 8, 8, dtype=torch.uint8)
    results = Results(tmp_path)
    assert results.columns(VANILLA) == strip_paths(results, ROWS, VANILLA) == {}
    captions = ["a coat", "a very wide and dark coat " * 4, "größer"]
    for shown in (VANILLA, HOLD):
        results.add_images(shown, images, conditions(*captions))
    assert results.columns(HOLD)["prompts"] == captions
    figure = grids(read_strips(strip_paths(results, ROWS, VANILLA)), captions)
    assert [[text.get_text().split()[-1] for text in axis.texts] for axis in figure.axes] == [
        [],
        ["coat", "coat", "größer"],
    ]
    places = [text.get_position()[0] for text in figure.axes[-1].texts]
    assert places == pytest.approx([1 / 6, 3 / 6, 5 / 6])


def test_strips_of_other_columns_are_left_out_and_the_log_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("lit_shortcut.report.grids.rank_zero_info", said.append)
    results, images = Results(tmp_path), torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    results.add_images(VANILLA, images, conditions("a coat", "a bag"))
    results.add_images(HOLD, images, conditions("a coat", "a bag"))
    for other in (conditions("a coat"), conditions("a coat", "a bag", first_seed=5), conditions("a coat", "a boot")):
        results.add_images(SHORT, images[: len(other.ids)], other)
        assert list(strip_paths(results, ROWS, VANILLA)) == [VANILLA.name, HOLD.name]
        assert SHORT.name in said.pop()
        assert not said
    assert list(strip_paths(results, [SHORT, HOLD], VANILLA)) == [SHORT.name]


def test_caption_with_dollar_signs_is_drawn_as_it_is() -> None:
    figure = grids({DOLLARS: torch.zeros(3, 10, 20, dtype=torch.uint8)}, [DOLLARS, "plain"])
    assert figure.axes[0].texts[0].get_text().replace("\n", " ") == DOLLARS
    assert pixels(figure).float().std() > 1
