from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from lit_shortcut.decoding.schedules import Schedule, share_masked, tokens_per_step

REFERENCE = json.loads((Path(__file__).parents[1] / "parity" / "schedules.json").read_text())
GOLDEN = REFERENCE["tokens_per_step"] + [
    {"schedule": "cosine_left", "counts": [a - b for a, b in pairwise([row["num_tokens"], *row["keep"]])]}
    | {size: row[size] for size in ("num_steps", "num_tokens")}
    for row in REFERENCE["dimoo_tokens_still_masked"]
]
SCHEDULES = get_args(Schedule)


@pytest.mark.parametrize("row", GOLDEN, ids=lambda row: f"{row['schedule']}-{row['num_steps']}-{row['num_tokens']}")
def test_counts_equal_the_reference(row: dict[str, Any]) -> None:
    assert tokens_per_step(row["schedule"], row["num_steps"], row["num_tokens"]) == row["counts"]


def test_reference_visits_every_schedule() -> None:
    elsewhere = {"arccos_left", "cosine_each", "linear_each"}
    assert {row["schedule"] for row in GOLDEN} == set(SCHEDULES) - elsewhere


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_share_falls_from_one_to_zero(schedule: Schedule) -> None:
    share = share_masked(schedule, torch.linspace(0, 1, 101, dtype=torch.float64))
    assert share[0].item() == pytest.approx(1)
    assert share[-1].item() == pytest.approx(0, abs=1e-12)
    assert bool((share.diff() < 0).all())


@pytest.mark.parametrize(
    ("schedule", "half_way"),
    [
        ("root", 1 - 0.5**0.5),
        ("linear", 0.5),
        ("square", 0.75),
        ("cosine", 0.5**0.5),
        ("cosine_left", 0.5**0.5),
        ("arccos", 2 / 3),
    ],
)
def test_share_half_way_is_known(schedule: Schedule, half_way: float) -> None:
    assert share_masked(schedule, torch.tensor(0.5, dtype=torch.float64)).item() == pytest.approx(half_way)


@pytest.mark.parametrize("num_tokens", [1, 16, 196, 256])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_counts_spend_all_tokens_or_are_refused(schedule: Schedule, num_tokens: int) -> None:
    accepted = 0
    for num_steps in range(1, num_tokens + 1):
        try:
            counts = tokens_per_step(schedule, num_steps, num_tokens)
        except ValueError as error:
            assert "use fewer steps" in str(error)  # noqa: PT017 - some pairs are refused, none may go wrong
            continue
        accepted += 1
        assert len(counts) == num_steps
        assert sum(counts) == num_tokens
        assert min(counts) >= (schedule not in ("cosine_left", "linear_each"))
        assert counts[-1] >= 1
    assert accepted >= num_tokens**0.5  # the sizes people use are not the refused ones


@pytest.mark.parametrize("schedule", ["root", "linear", "square", "arccos"])
def test_later_steps_reveal_no_fewer_tokens(schedule: Schedule) -> None:
    counts = tokens_per_step(schedule, num_steps=15, num_tokens=1024)
    assert all(earlier <= later for earlier, later in pairwise(counts))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_one_step_reveals_everything(schedule: Schedule) -> None:
    assert tokens_per_step(schedule, num_steps=1, num_tokens=16) == [16]


@pytest.mark.parametrize("num_steps", [-1, 0, 17])
def test_impossible_numbers_of_steps_are_refused(num_steps: int) -> None:
    with pytest.raises(ValueError, match=rf"1\.\.16.*got {num_steps}"):
        tokens_per_step("arccos", num_steps, num_tokens=16)


def test_overspent_counts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'root' cannot spend 64 tokens in 60 steps.*-"):
        tokens_per_step("root", num_steps=60, num_tokens=64)


def test_unknown_schedule_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"root, linear, .*got 'sine'"):
        share_masked("sine", torch.tensor(0.5))  # type: ignore[arg-type]


def test_counts_of_tokens_left_are_rounded_in_single_precision() -> None:
    """cos(π/3) is ½, less in float32 and more in float64: the reference leaves 1023 of 2048 tokens, not 1024."""
    counts = tokens_per_step("cosine_left", num_steps=12, num_tokens=2048)
    assert 2048 - sum(counts[:8]) == 1023


def test_a_step_of_many_may_reveal_nothing() -> None:
    assert tokens_per_step("cosine_left", num_steps=16, num_tokens=36)[:3] == [1, 0, 1]


def test_arccosines_are_taken_in_float32() -> None:
    """In float64 step 21 would commit a token less than the reference does, and step 22 one more."""
    assert tokens_per_step("arccos_left", num_steps=45, num_tokens=1024)[21:23] == [17, 16]


@pytest.mark.parametrize(("num_tokens", "num_steps"), [(36, 16), (64, 24), (256, 64), (5, 5), (16, 1)])
@pytest.mark.parametrize("schedule", ["cosine_each", "arccos_left"])
def test_every_step_reveals_a_token_where_there_are_enough(schedule: Schedule, num_tokens: int, num_steps: int) -> None:
    counts = tokens_per_step(schedule, num_steps, num_tokens)
    assert (len(counts), sum(counts)) == (num_steps, num_tokens)
    assert min(counts) >= 1


def test_last_token_waits_for_the_last_step_where_steps_are_more_than_tokens() -> None:
    assert tokens_per_step("cosine_each", num_steps=12, num_tokens=4) == [1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1]


@pytest.mark.parametrize("num_steps", [0, -1])
def test_no_steps_at_all_are_refused(num_steps: int) -> None:
    with pytest.raises(ValueError, match=rf"got {num_steps}"):
        tokens_per_step("cosine_each", num_steps, num_tokens=16)
