from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_shortcut.acceleration.accelerated import Past, Plan
from lit_shortcut.acceleration.plans import (
    Adaptive,
    Early,
    Even,
    Steps,
    early_steps,
    even_steps,
)
from lit_shortcut.acceleration.predictors import Hold
from lit_shortcut.contracts import Clock, Control, State
from lit_shortcut.guidance import guide

GOLDEN = json.loads((Path(__file__).parents[1] / "parity" / "schedules.json").read_text())["full_step_indices"]


@pytest.mark.parametrize("row", GOLDEN, ids=lambda row: f"{row['num_steps']}-{row['budget']}")
def test_plan_equals_the_reference(row: dict[str, Any]) -> None:
    assert even_steps(row["num_steps"], row["budget"]) == row["indices"]


@pytest.mark.parametrize("num_steps", [1, 2, 7, 15, 32, 64])
def test_plan_spends_exactly_its_budget(num_steps: int) -> None:
    for budget in range(1, num_steps + 1):
        plan = even_steps(num_steps, budget)
        assert len(plan) == len(set(plan)) == budget
        assert plan[0] == 0
        assert plan == sorted(plan)
        assert plan[-1] < num_steps


@pytest.mark.parametrize("num_steps", [7, 15, 32, 64])
def test_full_steps_are_spread_evenly(num_steps: int) -> None:
    for budget in range(1, num_steps + 1):
        gaps = [later - earlier for earlier, later in pairwise([*even_steps(num_steps, budget), num_steps])]
        assert max(gaps) - min(gaps) <= 2  # rounding moves either end of a gap by half a step at most, ties to even


@pytest.mark.parametrize("num_steps", [1, 15])
def test_full_budget_is_every_step_and_budget_one_the_first(num_steps: int) -> None:
    assert even_steps(num_steps, num_steps) == list(range(num_steps))
    assert even_steps(num_steps, 1) == [0]


@pytest.mark.parametrize("budget", [-1, 0, 16])
def test_budget_out_of_range_is_refused(budget: int) -> None:
    with pytest.raises(ValueError, match=rf"1\.\.15.*got {budget}"):
        even_steps(15, budget)


def steps_of(plan: Plan, counts: list[int]) -> list[int]:
    """Full steps of a plan that looks at the clock only."""
    nothing = torch.zeros(1, 0, dtype=torch.long)
    decide = plan.start(counts, Hold())
    past = Past(torch.zeros(1, 1, 1, 1), [])
    states = [
        State(Clock(k, len(counts)), nothing, Control(nothing, nothing), torch.ones(1), nothing)
        for k in range(len(counts))
    ]
    return [0, *(state.clock.step for state in states[1:] if decide(past, state))]


@pytest.mark.parametrize("power", [1.0, 1.3, 1.6, 2.0, 5.0])
@pytest.mark.parametrize("num_steps", [1, 8, 12, 15, 64])
def test_early_plan_spends_its_budget_and_only_ever_lies_before_the_even_one(num_steps: int, power: float) -> None:
    for budget in range(1, num_steps + 1):
        steps, even = early_steps(num_steps, budget, power), even_steps(num_steps, budget)
        assert len(steps) == budget
        assert steps[0] == 0
        assert steps == sorted(set(steps))
        assert all(step <= at for step, at in zip(steps, even, strict=True))
        assert power != 1 or steps == even


def test_early_plan_has_gaps_that_grow() -> None:
    assert [early_steps(12, budget, 1.5) for budget in (2, 3, 4, 6)] == [
        [0, 4],
        [0, 2, 7],
        [0, 2, 4, 8],
        [0, 1, 2, 4, 7, 9],
    ]


def test_power_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"power must be at least 1, got 0\.5"):
        Early(3, power=0.5)


def test_plans_decide_by_their_lists() -> None:
    counts = [1, 5, 6, 8, 9, 11, 12, 12]
    assert steps_of(Early(3), counts) == early_steps(8, 3, 1.5)
    assert steps_of(Even(3), counts) == even_steps(8, 3)
    assert steps_of(Steps([0, 1, 6]), counts) == [0, 1, 6]


@pytest.mark.parametrize("steps", [[], [1, 2], [0, 2, 2], [0, 3, 1], [0, -1]])
def test_steps_that_do_not_increase_from_zero_are_refused(steps: list[int]) -> None:
    with pytest.raises(ValueError, match=re.escape(str(steps))):
        Steps(steps)


def test_listed_steps_beyond_the_last_are_refused() -> None:
    with pytest.raises(ValueError, match=r"0\.\.7.*\[0, 8\]"):
        Steps([0, 8]).start([1] * 8, Hold())


@pytest.mark.parametrize(
    "arguments",
    [
        {"threshold": 0.0},
        {"threshold": float("nan")},
        {"threshold": 1.0, "max_gap": 0},
        {"threshold": 1.0, "per": "batches"},
    ],
)
def test_adaptive_plan_without_sense_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"threshold|max_gap|per must be one of sample, batch"):
        Adaptive(**arguments)


def test_adaptive_plan_sees_features_after_guidance() -> None:
    """A guided shortcut predicts the guided features for both branches, which then change though nothing moved."""
    full, nothing = torch.randn(2, 1, 4, 3), torch.zeros(1, 0, dtype=torch.long)
    predicted = guide(full, 1.5)[None].expand(2, -1, -1, -1)
    state = State(Clock(1, 4), torch.zeros(1, 4), Control(nothing, nothing), torch.ones(1), nothing, guidance=1.5)
    for features, is_full in ((predicted, False), (full, False), (2 * full, True)):
        decide = Adaptive(1e-3).start([1] * 4, Hold())
        assert not decide(Past(full, []), state)
        assert decide(Past(features, []), state) == is_full
