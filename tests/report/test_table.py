from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from scipy import stats

from lit_shortcut.evaluation.results import Results
from lit_shortcut.report.document import json_of, notes
from lit_shortcut.report.table import dominated, markdown, metric_names, within_best
from tests.report.made import HOLD, ROWS, SHORT, VANILLA, add, collected, make, row, set_latencies

NAMES = [one.name for one in ROWS]
NOTED: dict[str, Any] = {
    "latency": {"rounds": 1, "batch_size": 1, "device": "a CPU"},
    "higher_is_better": False,
    "num_steps": 8,
    "dtype": "float32",
}


@pytest.fixture
def results(tmp_path: Path) -> Results:
    return make(tmp_path)


@pytest.fixture
def table(results: Results) -> pd.DataFrame:
    return collected(results, ROWS, [0, 1, 2])


def cells(table: pd.DataFrame) -> list[list[str]]:
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown(table).splitlines()]
    return [lines[0], *lines[2:]]


def test_table_has_a_line_a_row_with_means_and_intervals_over_seeds(table: pd.DataFrame) -> None:
    assert list(table["name"]) == NAMES
    assert list(table["method"]) == ["vanilla", "vanilla", "hold"]
    assert list(table["N"]) == [8, 4, 8]
    assert list(table["b"]) == [8, 4, 2]
    assert list(table["distance"]) == [7.0, 9.5, 8.5]
    assert list(table["speedup"]) == [1.0, 2.0, 4.0]
    assert list(table["passes"]) == [8.0, 4.0, 2.0]
    assert set(table["seeds"]) == {3}
    assert set(table["images"]) == {500}
    low, high = stats.t.interval(0.95, df=2, loc=7.0, scale=stats.sem([6.0, 7.0, 8.0]))
    assert table["distance_interval"][0] == pytest.approx((high - low) / 2, rel=1e-5)
    assert metric_names(table) == ["distance", "agreement"]


def test_only_the_run_seeds_asked_for_count(results: Results) -> None:
    one = collected(results, ROWS, [2])
    assert list(one["distance"]) == [8.0, 10.0, 9.0]
    assert set(one["seeds"]) == {1}
    assert all(math.isnan(half) for half in one["distance_interval"])
    assert list(collected(results, ROWS, [0, 1])["seeds"]) == [2, 2, 2]


def test_seed_12_is_not_taken_for_seed_1(results: Results) -> None:
    add(results, VANILLA, 12, 99.0)
    assert collected(results, [VANILLA], [1])["distance"][0] == 7.0


def test_markdown_says_passes_latency_speed_up_and_interval(table: pd.DataFrame) -> None:
    header, first, _, held = cells(table)
    assert header[:6] == ["method", "N", "b", "latency ms/image", "cost in passes", "speed-up"]
    assert header[6:] == ["distance", "agreement"]
    assert first == ["vanilla", "8", "8", "80.0 (1.0)", "8.00", "1.00×", "7.000 ± 2.484", "0.500 ± 0.000"]
    assert held[:6] == ["hold", "8", "2", "20.0 (0.2)", "2.00", "4.00×"]


def test_measured_passes_of_an_adaptive_plan_stand_in_the_table(results: Results) -> None:
    adaptive = row(8, 2, "hold", "adaptive")
    add(results, adaptive, 0, 8.0, {"mean": 2.25, "low": 1, "high": 4})
    add(results, adaptive, 1, 8.0, {"mean": 2.75, "low": 2, "high": 6})
    header, *lines = cells(collected(results, [VANILLA, HOLD, adaptive], [0, 1]))
    assert [line[:4] for line in [header, *lines]] == [
        ["method", "N", "b", "plan"],
        ["vanilla", "8", "8", ""],
        ["hold", "8", "2", "even"],
        ["hold", "8", "2.5 (1–6)", "adaptive"],
    ]


def test_decoding_of_a_rows_own_stands_in_the_table(results: Results) -> None:
    own = row(8, {"order": "halton", "guidance": 1})
    add(results, own, 0, 5.0)
    lines = cells(collected(results, [VANILLA, own], [0]))
    assert [line[3] for line in lines] == ["decoding", "", "halton, guidance 1"]


def test_one_seed_without_latency_has_no_interval_and_no_latency(results: Results) -> None:
    (results.folder / "latency.json").unlink()
    text = markdown(collected(results, ROWS, [0]))
    assert "±" not in text
    assert "latency" not in text
    assert "nan" not in text


def test_latency_of_an_earlier_network_is_left_out(results: Results) -> None:
    text = markdown(collected(results, ROWS, [0], changed=(HOLD.name,)))
    assert [cell.strip() for cell in text.splitlines()[-1].split("|")[4:7]] == ["–"] * 3
    assert "80.0 (1.0)" in text
    assert "nan" not in text


def test_speed_up_needs_the_latency_it_refers_to(results: Results) -> None:
    text = markdown(collected(results, ROWS, [0], changed=(VANILLA.name,)))
    assert "×" not in text
    assert "nan" not in text
    assert "20.0 (0.2)" in text


def test_row_that_was_not_timed_has_dashes(results: Results) -> None:
    set_latencies(results, {VANILLA.name: (80.0, 1.0)})
    assert cells(collected(results, ROWS, [0]))[3][3:6] == ["–", "–", "–"]


def test_dominated_are_those_with_a_better_one_of_another_method_at_no_more_latency(table: pd.DataFrame) -> None:
    lower = {"metric": "distance", "higher_is_better": False}
    table["distance_interval"] = math.nan  # as with one seed
    assert dominated(table, **lower) == [(HOLD.name, SHORT.name)]
    table.loc[2, "latency_ms"] = 40.0
    assert dominated(table, **lower) == [(HOLD.name, SHORT.name)]  # equal latency suffices
    table.loc[2, "latency_ms"] = 41.0
    assert dominated(table, **lower) == []
    table.loc[2, "latency_ms"] = 90.0
    assert dominated(table, **lower) == [(VANILLA.name, HOLD.name)]
    table.loc[2, "distance"] = table.loc[0, "distance"]
    assert dominated(table, **lower) == []  # an equal distance is not a lower one
    table.loc[0, ["method", "latency_ms"]] = ["taylor", 90.0]
    table.loc[0, "distance"] -= 1
    assert dominated(table, **lower) == [(VANILLA.name, HOLD.name)]  # neither of them vanilla's


def test_rows_within_the_interval_of_their_difference_do_not_dominate(table: pd.DataFrame) -> None:
    lower = {"metric": "distance", "higher_is_better": False}
    assert dominated(table, **lower) == []  # 1.0 apart; three seeds leave 2.5 each
    table["distance_interval"] = [0.5, 0.8, 0.55]  # 0.97 together
    assert dominated(table, **lower) == [(HOLD.name, SHORT.name)]
    table["distance_interval"] = [0.5, 0.8, 0.65]  # 1.03 together
    assert dominated(table, **lower) == []


def test_speed_up_is_that_within_rounds(results: Results) -> None:
    measured = {
        VANILLA.name: {"median_ms": 100.0, "iqr_ms": 100.0, "passes": 8.0, "round_ms": [80.0, 100.0, 240.0]},
        SHORT.name: {"median_ms": 60.0, "iqr_ms": 60.0, "passes": 4.0, "round_ms": [40.0, 60.0, 120.0]},
    }
    results.set_latency({"rows": {name: {"base": 1} for name in measured}}, measured)
    assert list(collected(results, [VANILLA, SHORT], [0])["speedup"]) == [1.0, 2.0]  # 60 ms was a slower round


def test_fastest_rows_within_the_interval_of_the_best_vanilla_are_named(table: pd.DataFrame) -> None:
    lower = {"metric": "distance", "higher_is_better": False}
    assert list(within_best(table, **lower)["name"]) == [VANILLA.name, HOLD.name]  # 9.484 is allowed
    said = notes(table, "distance", **NOTED)
    assert f"best vanilla row, {VANILLA.name} with distance 7.000 ± 2.484: {HOLD.name}, 4.00 times as fast" in said
    table.loc[2, "distance"] = 9.49
    said = notes(table, "distance", **NOTED)
    assert said.endswith("± 2.484: none of hold")
    table.loc[1, "distance"] = 9.48
    assert list(within_best(table, **lower)["name"]) == [VANILLA.name, SHORT.name]
    assert list(within_best(table, "distance", higher_is_better=True)["name"]) == [SHORT.name, HOLD.name]
    table["distance_interval"] = math.nan
    assert within_best(table, **lower).empty
    assert within_best(table.drop(columns="speedup"), **lower).empty


def test_one_seed_is_compared_only_where_it_has_many_images(table: pd.DataFrame) -> None:
    table["seeds"], table["distance_interval"] = 1, math.nan
    assert "dominates" not in notes(table, "distance", **NOTED)
    assert "rows differ by chance" in notes(table, "distance", **NOTED)
    table["images"] = 5000
    assert f"{HOLD.name} dominates {SHORT.name}: lower distance at no more" in notes(table, "distance", **NOTED)


def test_higher_may_be_better(table: pd.DataFrame) -> None:
    table["distance_interval"] = 0.1
    assert dominated(table, "distance", higher_is_better=True) == [(HOLD.name, VANILLA.name)]


def test_json_holds_all_figures_and_no_nan(results: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/bin/lit-shortcut", "test"])
    content = json.loads(json_of(collected(results, ROWS, [0], changed=(HOLD.name,)), seeds=[0]))
    assert [line["name"] for line in content["rows"]] == NAMES
    assert content["rows"][0]["distance"] == 6.0
    assert "latency_ms" not in content["rows"][2]
    assert content["seeds"] == [0]
    assert {"python", "torch", "lightning"} <= content["versions"].keys()
    assert content["command"] == "lit-shortcut test"


def test_cost_at_a_lighter_step_is_computed_for_rows_with_a_shortcut(table: pd.DataFrame) -> None:
    below = notes(table, "distance", shortcuts=[HOLD.name], step_share=0.05, **NOTED)
    assert f"2.30 for {HOLD.name}" in below  # 2 + (8 − 2) · 0.05
    assert "0.05" not in notes(table, "distance", shortcuts=[HOLD.name], **NOTED)
