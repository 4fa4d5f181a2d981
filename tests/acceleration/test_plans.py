from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from lit_shortcut.acceleration.plans import full_steps

GOLDEN = json.loads((Path(__file__).parents[1] / "parity" / "schedules.json").read_text())["full_step_indices"]


@pytest.mark.parametrize("row", GOLDEN, ids=lambda row: f"{row['num_steps']}-{row['budget']}")
def test_plan_equals_the_reference(row: dict[str, Any]) -> None:
    assert full_steps(row["num_steps"], row["budget"]) == row["indices"]


@pytest.mark.parametrize("num_steps", [1, 2, 7, 15, 32, 64])
def test_plan_spends_exactly_its_budget(num_steps: int) -> None:
    for budget in range(1, num_steps + 1):
        plan = full_steps(num_steps, budget)
        assert len(plan) == len(set(plan)) == budget
        assert plan[0] == 0
        assert plan == sorted(plan)
        assert plan[-1] < num_steps


@pytest.mark.parametrize("num_steps", [7, 15, 32, 64])
def test_full_steps_are_spread_evenly(num_steps: int) -> None:
    for budget in range(1, num_steps + 1):
        gaps = [later - earlier for earlier, later in pairwise([*full_steps(num_steps, budget), num_steps])]
        assert max(gaps) - min(gaps) <= 2  # rounding moves either end of a gap by half a step at most, ties to even


@pytest.mark.parametrize("num_steps", [1, 15])
def test_full_budget_is_every_step_and_budget_one_the_first(num_steps: int) -> None:
    assert full_steps(num_steps, num_steps) == list(range(num_steps))
    assert full_steps(num_steps, 1) == [0]


@pytest.mark.parametrize("budget", [-1, 0, 16])
def test_budget_out_of_range_is_refused(budget: int) -> None:
    with pytest.raises(ValueError, match=rf"1\.\.15.*got {budget}"):
        full_steps(15, budget)
