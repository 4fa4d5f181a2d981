from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_shortcut.acceleration.accelerated import Accelerated, Predictor
from lit_shortcut.acceleration.calibrated import Calibrated, CalibratedAdaptive, PlanFile, SearchedSteps
from lit_shortcut.acceleration.calibration import Segments, best_plan, cost_of, threshold_for
from lit_shortcut.acceleration.plans import Adaptive, Steps, even_steps
from lit_shortcut.acceleration.predictors import Hold, Taylor
from lit_shortcut.acceleration.replay import replayed
from lit_shortcut.acceleration.shortcut import Shortcut
from tests.acceleration.recorded import COUNTS, NUM_STEPS, network, replay

PREDICTORS = [Hold(), Taylor(1), Taylor(2), Shortcut(network()), Shortcut(network(anchored=True, guided=True))]
every_predictor = pytest.mark.parametrize("predictor", PREDICTORS)


def segments_of(predictor: Predictor) -> Segments:
    return Segments.none(NUM_STEPS, predictor.memory, torch.device("cpu")).measured(replay(), predictor)


def replayed_cost(predictor: Predictor, steps: list[int]) -> float:
    return float(replayed(replay(), {"": Accelerated(Steps(steps), predictor)})[""].kl.sum())


@every_predictor
def test_cost_of_a_plan_is_what_replaying_it_loses(predictor: Predictor) -> None:
    segments = segments_of(predictor)
    for budget in range(1, NUM_STEPS + 1):
        steps = even_steps(NUM_STEPS, budget)
        assert cost_of(segments, steps) == pytest.approx(replayed_cost(predictor, steps), rel=1e-4, abs=1e-5)


@every_predictor
def test_search_finds_the_cheapest_of_all_plans(predictor: Predictor) -> None:
    segments = segments_of(predictor)
    for budget in range(1, NUM_STEPS + 1):
        plans = [[0, *rest] for rest in combinations(range(1, NUM_STEPS), budget - 1)]
        found = best_plan(segments, budget)
        assert found.kl == pytest.approx(min(cost_of(segments, plan) for plan in plans), rel=1e-6, abs=1e-6)
        assert found.kl == pytest.approx(replayed_cost(predictor, found.steps), rel=1e-4, abs=1e-5)
        assert len(found.steps) == budget


def test_batches_add_up() -> None:
    predictor = Hold()
    both = segments_of(predictor).measured(replay(seed=3), predictor)
    single = Segments.none(NUM_STEPS, 0, torch.device("cpu")).measured(replay(seed=3), predictor)
    assert cost_of(both, [0, 3]) == pytest.approx(cost_of(segments_of(predictor), [0, 3]) + cost_of(single, [0, 3]))


def test_line_through_two_full_steps_costs_nothing_on_linear_features() -> None:
    start, slope = torch.randn(2, 5, 2, 10, 6, generator=torch.Generator().manual_seed(4))

    def path(step: int) -> Tensor:
        return start + step * slope

    segments = Segments.none(NUM_STEPS, 2, torch.device("cpu")).measured(replay(path), Taylor(1))
    assert cost_of(segments, [0, 1]) == pytest.approx(0, abs=1e-4)
    assert best_plan(segments, 2).steps == [0, 1]
    assert cost_of(segments, [0, 3]) > 1


def test_too_many_histories_are_refused() -> None:
    with pytest.raises(ValueError, match="64 steps"):
        Segments.none(64, 3, torch.device("cpu"))


@pytest.mark.parametrize("budget", [2, 3, 4])
def test_threshold_makes_the_wanted_mean_number_of_full_steps(budget: int) -> None:
    recorded, predictor = replay(count=40), Shortcut(network())

    def mean(threshold: float) -> float:
        method = Accelerated(Adaptive(threshold, per="sample"), predictor)
        return float(replayed(recorded, {"": method}, with_kl=False)[""].full_steps.mean())

    threshold, found = threshold_for(mean, budget)
    assert mean(threshold) == found == pytest.approx(budget, abs=0.1)


# ---- the file


@pytest.fixture
def path(tmp_path: Path) -> Path:
    schedule = SearchedSteps(
        counts=COUNTS,
        trajectories=5,
        steps={"2": [0, 4], "3": [0, 1, 4]},
        kl={"2": 1.5, "3": 1.0},
        adaptive={"2": {"threshold": 1e6, "per": "batch", "max_gap": 2, "budget": 2}},
        mean_full_steps={"2": 2.0},
    )
    PlanFile(Hold().identity(), "0123456789abcdef", [schedule]).write(tmp_path / "plan.json")
    return tmp_path / "plan.json"


def full_steps_of(plan: Calibrated | CalibratedAdaptive, predictor: Predictor) -> list[int]:
    run = Accelerated(plan, predictor).start(replay(), replay().recorded, COUNTS)
    return [state.clock.step for state in replay().states() if run(state)[1] is True]


def test_plans_are_read_from_their_file(path: Path) -> None:
    assert full_steps_of(Calibrated(3, path), Hold()) == [0, 1, 4]
    assert full_steps_of(CalibratedAdaptive(2, path), Hold()) == [0, 3]  # hold never changes: by its largest gap


def test_plan_searched_on_another_base_is_refused(path: Path) -> None:
    content = json.loads(path.read_text()) | {"base_fingerprint": "f" * 16}
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"plan\.json: plans for base f{{16}}, not for base {replay().fingerprint}"):
        full_steps_of(Calibrated(3, path), Hold())


def test_identity_changes_with_the_file(path: Path) -> None:
    before = Calibrated(2, path).identity()
    assert before == Calibrated(2, path).identity() != CalibratedAdaptive(2, path).identity()
    content = json.loads(path.read_text())
    content["schedules"][0]["steps"]["2"] = [0, 5]
    path.write_text(json.dumps(content))
    assert Calibrated(2, path).identity() != before


def test_file_keeps_the_schedules_of_other_steps_for_the_same_predictor(path: Path) -> None:
    other = SearchedSteps(counts=[4, 5], trajectories=5, steps={"1": [0]}, kl={"1": 2.0})
    PlanFile(Hold().identity(), "0123456789abcdef", [other]).write(path)
    assert [len(schedule.counts) for schedule in PlanFile.read(path).schedules] == [6, 2]
    PlanFile(Taylor(1).identity(), "0123456789abcdef", [other]).write(path)
    assert [len(schedule.counts) for schedule in PlanFile.read(path).schedules] == [2]


@pytest.mark.parametrize(
    ("budget", "counts", "predictor", "named"),
    [
        (2, COUNTS, Taylor(1), "taylor 1"),
        (2, [3, 3, 3], Hold(), "3 steps"),
        (2, [1, 1, 1, 1, 2, 3], Hold(), "1, 1, 1, 1, 2, 3"),
        (4, COUNTS, Hold(), "budget 4"),
    ],
)
def test_plan_for_something_else_is_refused(
    path: Path, budget: int, counts: list[int], predictor: Predictor, named: str
) -> None:
    with pytest.raises(ValueError, match=rf"plan.json.*{named}"):
        Calibrated(budget, path).start(counts, predictor)


def test_budget_without_a_threshold_is_refused(path: Path) -> None:
    with pytest.raises(ValueError, match=r"plan.json.*adaptive.*budget 3"):
        CalibratedAdaptive(3, path).start(COUNTS, Hold())


@pytest.mark.parametrize("broken", [{"steps": {"2": 3}}, {"adaptive": {"2": {"thresh": 1}}}], ids=str)
def test_plan_that_makes_no_sense_is_named_with_its_file(path: Path, broken: dict[str, Any]) -> None:
    content = json.loads(path.read_text())
    content["schedules"][0] |= broken
    path.write_text(json.dumps(content))
    plan = Calibrated(2, path) if "steps" in broken else CalibratedAdaptive(2, path)
    with pytest.raises(ValueError, match=r"plan\.json: calibrated.* plan of budget 2: "):
        plan.start(COUNTS, Hold())


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"predictor": {}, "base_fingerprint": "", "schedules": [{}]}'])
def test_file_that_holds_no_plans_is_refused(path: Path, content: str) -> None:
    path.write_text(content)
    with pytest.raises(ValueError, match=r"plan\.json"):
        Calibrated(2, path)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.json"):
        Calibrated(2, tmp_path / "none.json")
