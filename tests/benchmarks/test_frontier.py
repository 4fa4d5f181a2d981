from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks import frontier
from lit_shortcut.acceleration.predictors import Hold
from lit_shortcut.evaluation.rows import build_rows
from lit_shortcut.sampling import Decoding
from tests.command_line import CONFIGS, lightning

METHODS: Any = {
    "hold": {"class_path": "lit_shortcut.acceleration.predictors.Hold"},
    "taylor": {"class_path": "lit_shortcut.acceleration.predictors.Taylor", "init_args": {"order": 1}},
}


def report(**rows: tuple[float, float]) -> dict[str, Any]:
    """Rows by name with latency and quality, lower is better."""
    lines = [
        {"name": name, "method": name.split("_")[0], "latency_ms": latency, "fid": quality}
        for name, (latency, quality) in rows.items()
    ]
    return {"quality": "fid", "higher_is_better": False, "rows": lines}


def test_only_rows_that_none_of_their_method_beats_are_kept() -> None:
    entries = [[4], [8], [16], [8, 2, "hold"], [8, 3, "hold"], [8, 4, "hold"]]
    found = report(
        vanilla_n4=(4, 3.0),
        vanilla_n8=(8, 1.0),
        vanilla_n16=(16, 1.5),
        hold_n8_b2=(2, 9.0),
        hold_n8_b3=(3, 9.5),
        hold_n8_b4=(4, 4.0),  # vanilla in 4 steps beats it, no row of its own does
    )
    assert frontier.best(entries, found, METHODS) == [[4], [8], [8, 2, "hold"], [8, 4, "hold"]]


def test_of_one_point_s_decodings_only_the_best_counts() -> None:
    entries = [[8], [8, 2, "hold"], [8, 2, "hold", {"guidance": 1.0}]]
    found = report(vanilla_n8=(8, 1.0), hold_n8_b2=(1.9, 4.0), hold_n8_b2_guidance1=(2, 3.0))
    assert frontier.best(entries, found, METHODS) == [[8], [8, 2, "hold", {"guidance": 1.0}]]


@pytest.mark.parametrize("path", (CONFIGS.parent / "benchmarks").glob("frontier_*.yaml"), ids=lambda path: path.stem)
def test_frontiers_of_the_defaults_name_decodings_that_exist_and_other_seeds(path: Path) -> None:
    asked = yaml.safe_load(path.read_text())
    assert asked["reference"] in asked["num_steps"]
    assert not {*asked["selection"]["run_seeds"]} & {*asked["evaluation"]["run_seeds"]}
    methods = dict.fromkeys(asked["methods"], Hold())
    build_rows([[asked["reference"], own] for own in asked["decodings"]], Decoding(), methods)


def test_methods_are_swept_and_the_best_rows_measured_on_other_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "configs").symlink_to(CONFIGS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(frontier, "run", partial(lightning, tmp_path))
    frontier.main(
        "toy",
        METHODS,
        num_steps=[3, 6],
        budgets=[2, 4],
        decodings=[{"confidence_noise": 1.0}],
        selection=frontier.Seeds(8, [5]),
        evaluation=frontier.Seeds(8, [10, 11]),
        reference=6,
    )
    folder = Path("runs/frontier/toy")
    sweep, final = (json.loads((folder / part / "report.json").read_text()) for part in ("sweep", "report"))
    names = [row["name"] for row in sweep["rows"]]
    assert {"vanilla_n3", "hold_n3_b2", "taylor_n6_b4"} <= {*names}
    assert "hold_n3_b4" not in names
    retuned = [name for name in names if name.endswith("confidence_noise1")]
    assert 3 <= len(retuned) < len(names) / 2  # one for each row of a front, at least one a method
    assert final["seeds"] == [10, 11]
    kept = [row["name"] for row in final["rows"]]
    assert "vanilla_n6" in kept
    assert {*kept} <= {*names}
    assert {row["method"] for row in final["rows"]} == {"vanilla", "hold", "taylor"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"evaluation": frontier.Seeds(8, [5, 6])}, r"evaluation\.run_seeds must not be .*: \[5\]"),
        ({"reference": 4}, r"reference must be one of num_steps \[3, 6\], got 4"),
    ],
)
def test_arguments_that_would_spoil_the_choice_are_refused(change: dict[str, Any], message: str) -> None:
    asked: dict[str, Any] = {"num_steps": [3, 6], "budgets": [2], "decodings": [], "reference": 6}
    asked |= {"selection": frontier.Seeds(8, [5]), "evaluation": frontier.Seeds(8, [10])}
    with pytest.raises(ValueError, match=message):
        frontier.main("toy", METHODS, **asked | change)
