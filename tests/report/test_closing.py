from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from lit_shortcut.report.closing import closing

ROWS = [  # name, method, latency, FID
    ("vanilla_n8", "vanilla", 30.0, 0.2),
    ("vanilla_n5", "vanilla", 19.0, 0.3),
    ("vanilla_n3", "vanilla", 11.0, 0.7),
    ("shortcut_n8_b2", "shortcut", 12.0, 0.35),
    ("shortcut_n8_b4", "shortcut", 20.0, 0.25),
    ("shortcut_n8_b7", "shortcut", 40.0, 0.1),
    ("hold_n8_b4", "hold", 15.0, 0.22),
]
SHORTCUTS = ["shortcut_n8_b2", "shortcut_n8_b4", "shortcut_n8_b7"]


def closed(rows: list[Any] = ROWS, *, higher_is_better: bool = False, **settings: Any) -> str:
    table = pd.DataFrame(rows, columns=["name", "method", "latency_ms", "fid"])
    table["speedup"] = 30 / table["latency_ms"]
    settings = {"shortcuts": SHORTCUTS, "reference": "vanilla_n8", "quality": "fid"} | settings
    return closing(table, higher_is_better=higher_is_better, **settings)


def test_best_shortcut_is_the_best_of_those_faster_than_vanilla() -> None:
    assert closed() == (
        "best shortcut: shortcut_n8_b4 has fid 0.250 at 20.0 ms/image, 1.50× as fast as vanilla_n8 (0.200); "
        "nearest in latency, vanilla_n5 has 0.300 at 19.0"
    )


def test_higher_metric_is_better_where_it_says_so() -> None:
    assert closed(higher_is_better=True).startswith("best shortcut: shortcut_n8_b2 has")


def test_shortcut_slower_than_vanilla_is_shown_where_none_is_faster() -> None:
    line = closed(shortcuts=["shortcut_n8_b7"])
    assert line.endswith("shortcut_n8_b7 has fid 0.100 at 40.0 ms/image, 0.75× as fast as vanilla_n8 (0.200)")


@pytest.mark.parametrize("missing", ["shortcut", "latency", "reference", "quality"])
def test_nothing_is_compared_that_was_not_measured(missing: str) -> None:
    nothing = float("nan")
    rows = [(*row[:2], nothing, row[3]) if missing == "latency" and row[0] in SHORTCUTS else row for row in ROWS]
    rows = [row for row in rows if missing != "reference" or row[0] != "vanilla_n8"]
    settings = {"shortcut": {"shortcuts": []}, "quality": {"quality": None}}.get(missing, {})
    assert not closed(rows, **settings)


def test_three_lines_say_what_was_gained_where_to_look_and_what_to_run() -> None:
    lines = closed(page=Path("runs/report.html"), command="make report-full").splitlines()
    assert [line.partition(":")[0] for line in lines] == ["best shortcut", "page", "next"]
    assert lines[1:] == ["page: runs/report.html", "next: make report-full"]
