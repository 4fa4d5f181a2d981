from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lit_shortcut.acceleration.accelerated import Accelerated, Predictor
from lit_shortcut.acceleration.linear import Linear, inner_products, save, weights_for
from lit_shortcut.acceleration.plans import Steps
from lit_shortcut.acceleration.predictors import Hold, Taylor
from lit_shortcut.acceleration.replay import RecordedEnds, Replay, replayed
from lit_shortcut.contracts import Trajectories
from lit_shortcut.weights import WeightsError, save_tensors
from tests.acceleration.recorded import COUNTS, ENDS, GUIDANCE, NUM_STEPS, trajectories

CPU = torch.device("cpu")


def fitted(path: Path, recorded: Trajectories, memory: int) -> Linear:
    save(path, inner_products(recorded, ENDS.interface, CPU), ENDS.fingerprint)
    return Linear(path, memory)


def squared_error(recorded: Trajectories, predictor: Predictor, steps: list[int]) -> float:
    """Over all steps and rows still masked."""
    replay, total = Replay(ENDS, recorded, GUIDANCE), 0.0
    run = Accelerated(Steps(steps), predictor).start(replay, replay.recorded, COUNTS)
    for state, truth in replay.steps():
        error = (run(state)[0] - truth)[:, :, :9].square().sum(-1)
        total += float(error[(recorded.committed_at >= state.clock.step).expand(2, -1, -1)].sum())
    return total


def test_weights_are_those_of_least_squares_over_rows_still_masked() -> None:
    recorded, nodes, step = trajectories(), [1, 3], 4
    rows = [
        recorded.features[row, :, :, :9][:, :, recorded.committed_at[row] >= step].transpose(0, 1).flatten(1)
        for row in range(5)
    ]
    every = torch.cat(rows, dim=1)  # (N, values)
    expected = torch.linalg.lstsq(every[nodes].T, every[step, :, None]).solution[:, 0]
    found = weights_for(inner_products(recorded, ENDS.interface, CPU), nodes, step)
    assert found == pytest.approx(expected.tolist(), rel=1e-3)


@pytest.mark.parametrize("steps", [[0], [0, 3], [0, 1, 4]])
def test_fit_is_no_worse_than_hold_or_a_line_on_what_it_was_fitted_on(tmp_path: Path, steps: list[int]) -> None:
    recorded = trajectories(count=8)
    linear = squared_error(recorded, fitted(tmp_path / "linear.safetensors", recorded, 2), steps)
    assert 0 < linear <= squared_error(recorded, Hold(), steps)
    assert linear <= squared_error(recorded, Taylor(1), steps)


def test_features_on_a_line_are_predicted_exactly(tmp_path: Path) -> None:
    start, slope = torch.randn(2, 5, 2, 10, 6, generator=torch.Generator().manual_seed(4))

    def path(step: int) -> Tensor:
        return start + step * slope

    recorded = trajectories(path)
    method = Accelerated(Steps([0, 2]), fitted(tmp_path / "linear.safetensors", recorded, 2))
    replay = Replay(ENDS, recorded, GUIDANCE)
    run = method.start(replay, replay.recorded, COUNTS)
    for state, truth in replay.steps():
        features, _ = run(state)
        if state.clock.step > 2:
            torch.testing.assert_close(features[:, :, :9], truth[:, :, :9], rtol=1e-3, atol=1e-3)


def test_full_budget_loses_nothing(tmp_path: Path) -> None:
    recorded = trajectories()
    method = Accelerated(Steps(list(range(NUM_STEPS))), fitted(tmp_path / "linear.safetensors", recorded, 3))
    assert replayed(Replay(ENDS, recorded, GUIDANCE), {"": method})[""].kl.tolist() == [0] * 5


def test_other_base_steps_memory_and_file_are_refused(tmp_path: Path) -> None:
    recorded, path = trajectories(), tmp_path / "linear.safetensors"
    linear = fitted(path, recorded, 1)
    other = Replay(RecordedEnds(ENDS.spec, ENDS.interface, "fedcba9876543210"), recorded, GUIDANCE)
    with pytest.raises(WeightsError, match="fedcba9876543210"):
        linear.start(other, other.recorded)
    fewer = Replay(
        ENDS,
        recorded._replace(features=recorded.features[:, :, :4], committed_at=recorded.committed_at.clamp(max=3)),
        GUIDANCE,
    )
    run = Accelerated(Steps([0]), linear).start(fewer, fewer.recorded, fewer.counts)
    first, second, *_ = fewer.states()
    run(first)
    with pytest.raises(WeightsError, match=r"6 steps.* got 4"):
        run(second)
    with pytest.raises(ValueError, match="memory"):
        Linear(path, 0)
    save_tensors(path, {"something": torch.zeros(1)}, {})
    with pytest.raises(WeightsError, match="something"):
        Linear(path)
