"""A step asks the device for little beside its network, and never waits for it; counted on the CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.decodings import decoding_of
from lit_shortcut.acceleration.accelerated import Accelerated
from lit_shortcut.acceleration.plans import Even
from lit_shortcut.acceleration.predictors import Hold
from lit_shortcut.acceleration.shortcut import Shortcut
from lit_shortcut.contracts import Acceleration, MaskedImageModel
from lit_shortcut.sampling import Decoding, sample
from tests.gpu.cases import CASES, Case, accelerations, maskgit
from tests.gpu.launches import Launches, launches_of

DECODING = Decoding(num_steps=6)


def steps_of(
    base: MaskedImageModel, case: Case, acceleration: Acceleration, decoding: Decoding = DECODING
) -> list[Launches]:
    """What each step asks for; its number, from 0, is its place in the list."""
    run = sample(base, case.conditions(), decoding, acceleration)
    return [launches_of(lambda: next(run)) for _ in range(decoding.num_steps)]


def test_a_hold_step_is_at_most_30_launches() -> None:
    steps = steps_of(maskgit(depth=24), CASES["maskgit"], Accelerated(Even(1), Hold()))
    assert max(step.total for step in steps[1:]) <= 30


DIMOO = replace(decoding_of("dimoo"), num_steps=6, schedule="arccos")
BUDGETS = [("maskgit", DECODING, 85), ("masked rows", DECODING, 110), ("dimoo", DECODING, 164), ("dimoo", DIMOO, 235)]
BUDGETS += [("dimoo, padded", DECODING, 175), ("dimoo, padded", DIMOO, 246)]


@pytest.mark.parametrize(("name", "decoding", "budget"), BUDGETS)
def test_a_shortcut_step_stays_within_its_budget_of_launches(name: str, decoding: Decoding, budget: int) -> None:
    case = CASES[name]
    shortcut = Accelerated(Even(1), Shortcut(case.make_network()))
    steps = steps_of(case.make_base(), case, shortcut, decoding)
    assert max(step.total for step in steps[1:]) <= budget


@pytest.mark.parametrize("decoding", [DECODING, Decoding(6, order="halton_rolled"), Decoding(6, temperature=0.7)])
@pytest.mark.parametrize("name", CASES)
def test_no_step_reads_anything_back(name: str, decoding: Decoding) -> None:
    case = CASES[name]
    base = case.make_base()
    for acceleration in accelerations(case.make_network()).values():
        for step in steps_of(base, case, acceleration, decoding)[1:]:
            assert not step.reads


def test_a_step_of_the_loop_costs_as_much_at_every_index() -> None:
    totals = {step.total for step in steps_of(maskgit(), CASES["maskgit"], Accelerated(Even(1), Hold()))[1:]}
    assert len(totals) == 1


def test_reads_are_seen_and_views_are_free() -> None:
    numbers = torch.arange(4.0)
    assert launches_of(lambda: numbers.sum().item()).reads.total() == 1
    assert launches_of(lambda: numbers[numbers > 1]).reads.total() == 1
    assert launches_of(lambda: numbers.view(2, 2).T[0]).total == 0
    assert launches_of(lambda: numbers + numbers).total == 1
