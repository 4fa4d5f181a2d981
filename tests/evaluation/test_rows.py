from __future__ import annotations

from typing import Any

import pytest

from lit_shortcut.acceleration.accelerated import Accelerated, Vanilla
from lit_shortcut.acceleration.plans import Adaptive, Early, Even, Steps
from lit_shortcut.acceleration.predictors import Hold, Taylor
from lit_shortcut.decoding.temperature import TemperatureCourse
from lit_shortcut.evaluation.rows import Row, build_rows
from lit_shortcut.sampling import Decoding

DECODING = Decoding(num_steps=6)
METHODS: dict[str, Any] = {"hold": Hold(), "taylor2": Taylor(2)}
PLANS: dict[str, Any] = {"mine": Even, "adaptive": Adaptive(0.5, budget=2.5)}


def build(*entries: Any) -> list[Row]:
    return build_rows(entries, DECODING, METHODS, PLANS)


def plan_of(row: Row) -> Any:
    assert isinstance(row.acceleration, Accelerated)
    return row.acceleration.plan


@pytest.mark.parametrize(
    ("entry", "name"),
    [
        ([8], "vanilla_n8"),
        ([8, 3, "hold"], "hold_n8_b3"),
        ([16, 4, "taylor2"], "taylor2_n16_b4"),
        ([16, 4, "hold", "early"], "hold_n16_b4_early"),
        ([16, 4, "hold", "mine"], "hold_n16_b4_mine"),
        ([16, [0, 3, 9], "hold"], "hold_n16_b3_steps0-3-9"),
        ([16, {"order": "halton"}], "vanilla_n16_halton"),
        ([6, {"temperature_course": {"first": 2, "last": 0.5}}], "vanilla_n6_temperature_coursefirst2-last0.5"),
        ([16, 4, "hold", {"confidence_noise": 4.5, "guidance": 1}], "hold_n16_b4_confidence_noise4.5_guidance1"),
    ],
)
def test_name_says_all_that_the_row_spells(entry: list[Any], name: str) -> None:
    assert build(entry)[0].name == name


def test_row_decodes_as_it_says() -> None:
    vanilla, held, early, listed, own = build(
        [8],
        [16, 4, "hold"],
        [16, 4, "hold", "early"],
        [16, [0, 3], "hold"],
        [5, {"guidance": 1, "order": "halton"}],
    )
    assert isinstance(vanilla.acceleration, Vanilla)
    assert vanilla.decoding == DECODING.at(8)
    assert held.decoding == DECODING.at(16)
    assert (type(plan_of(held)), plan_of(held).budget) == (Even, 4)
    assert (type(plan_of(early)), plan_of(early).budget) == (Early, 4)
    assert (type(plan_of(listed)), plan_of(listed).steps, listed.plan) == (Steps, [0, 3], "steps0-3")
    assert own.decoding == Decoding(num_steps=5, guidance=1, order="halton")
    assert own.settings == "guidance 1, halton"
    (course,) = build([5, {"temperature_course": {"first": 2.0}}])
    assert course.decoding.temperature_course == TemperatureCourse(first=2.0)


def test_plan_with_a_budget_of_its_own_is_taken_as_it_is() -> None:
    (row,) = build([6, 2, "hold", "adaptive"])
    assert plan_of(row) is PLANS["adaptive"]
    assert row.budget == 2


def test_plan_with_another_budget_than_the_row_is_refused() -> None:
    plans = {"mine": Steps([0, 1, 2, 5, 8])}
    (row,) = build_rows([[16, 5, "hold", "mine"]], Decoding(), {"hold": Hold()}, plans)
    assert row.budget == 5
    with pytest.raises(ValueError, match=r"budget must be 5, that of the plan named 'mine'; got 3"):
        build_rows([[16, 3, "hold", "mine"]], Decoding(), {"hold": Hold()}, plans)


def test_method_is_called_by_its_name_in_yaml() -> None:
    (row,) = build_rows([[6, 2, "ours"]], DECODING, {"ours": Hold()})
    assert (row.name, row.method) == ("ours_n6_b2", "ours")


@pytest.mark.parametrize(
    ("entry", "parts"),
    [
        ([8, 3, "shortcut"], ["no method", "'shortcut'", "hold, taylor2"]),
        ([8, 3, "hold", "calibrated"], ["no plan", "'calibrated'", "even, early, mine, adaptive"]),
        ([6, 7, "hold"], ["budget", "1..6", "7"]),
        ([6, 0, "hold"], ["budget", "1..6", "0"]),
        ([6, [1, 2], "hold"], ["steps", "[1, 2]"]),
        ([6, [0, "two"], "hold"], ["steps", "two"]),
        ([8, 3], ["[8, 3]", "[N, b, method]"]),
        ([0], ["[0]", "num_steps", "0"]),
        ([], ["[]", "[N]"]),
        (["8"], ["'8'", "[N]"]),
        ([8, 3, "hold", "even", "more"], ["more", "[N, b, method, plan]"]),
        (8, ["8", "[N]"]),
        ([6, {"steps": 3}], ["'steps'", "guidance"]),
        ([6, {"num_steps": 3}], ["'num_steps'"]),
        ([6, {"guidance": "high"}], ["guidance", "'high'"]),
        ([6, {"guidance": True}], ["guidance", "True"]),
        ([6, {"order": "random"}], ["order", "random", "halton"]),
        ([6, {"temperature": -1}], ["temperature", "-1"]),
        ([6, {"schedule": "slow"}], ["schedule", "slow", "arccos"]),
        ([6, {"temperature_course": 2}], ["temperature_course", "mapping", "2"]),
        ([6, {"temperature_course": {"middle": 2}}], ["middle"]),
        ([6, {"temperature_course": {"first": -1}}], ["temperature_course.first", "-1"]),
    ],
)
def test_malformed_row_is_shown_with_what_is_known(entry: Any, parts: list[str]) -> None:
    with pytest.raises(ValueError, match="row") as caught:
        build([6], entry)
    for part in parts:
        assert part in str(caught.value)


def test_row_given_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="hold_n6_b2"):
        build([6], [6, 2, "hold"], [6, 2, "hold", "even"])


@pytest.mark.parametrize("name", ["vanilla", "a/b", "$x", "", "../up"])
def test_name_that_no_file_could_bear_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"got {name!r}".replace("$", r"\$")):
        build_rows([[6]], DECODING, {name: Hold()})
