from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from scipy import interpolate
from torch import Tensor

from lit_shortcut.acceleration.accelerated import Accelerated, Past, PredictFn
from lit_shortcut.acceleration.plans import Even, even_steps
from lit_shortcut.acceleration.predictors import Hold, Taylor, lagrange_weights
from lit_shortcut.bases.maskgit.adapter import MaskGIT
from lit_shortcut.contracts import BaseEnds, Clock, Context, Control, State

SHAPE = (2, 3, 5, 4)  # G, B, S, C
CONTEXT = Context()
NODES = [[0, 1], [0, 3], [2, 7], [0, 1, 2], [0, 2, 7], [3, 4, 9]]


def state(index: int) -> State:
    nothing = torch.zeros(SHAPE[1], 0, dtype=torch.long)
    tokens, share = torch.zeros(SHAPE[1], 4, dtype=torch.long), torch.ones(SHAPE[1])
    return State(Clock(index, 15), tokens, Control(nothing, nothing), share, nothing)


def polynomial(degree: int, seed: int = 0) -> Callable[[int], Tensor]:
    """Features that move along a random polynomial of the step's index."""
    coefficients = torch.randn(degree + 1, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return lambda index: sum((c * index**power for power, c in enumerate(coefficients)), torch.zeros(SHAPE).double())


class MovingBase:
    """Stands for a base whose features depend on the step alone; the test moves ``index``."""

    def __init__(self, path: Callable[[int], Tensor]) -> None:
        self.path, self.index = path, 0

    def features(self, tokens: Tensor, context: Context, clock: Clock) -> Tensor:
        return self.path(self.index)


def test_hold_repeats_the_latest_features_not_the_last_full_ones(base: MaskGIT) -> None:
    latest, full = torch.randn(SHAPE), torch.randn(SHAPE)
    assert torch.equal(Hold().start(base, CONTEXT)(Past(latest, [(0, full)]), state(3)), latest)


@pytest.mark.parametrize(("order", "nodes"), [(len(nodes) - 1, nodes) for nodes in NODES])
@pytest.mark.parametrize("ahead", [1, 2, 6])
def test_taylor_is_exact_on_polynomials_of_its_order(base: MaskGIT, order: int, nodes: list[int], ahead: int) -> None:
    path, index = polynomial(order), nodes[-1] + ahead
    past = Past(torch.full(SHAPE, torch.nan).double(), [(node, path(node)) for node in nodes])
    predicted = Taylor(order).start(base, CONTEXT)(past, state(index))
    torch.testing.assert_close(predicted, path(index), rtol=1e-9, atol=1e-9)


def test_taylor_of_order_one_is_not_exact_on_parabolas(base: MaskGIT) -> None:
    path = polynomial(2)
    predicted = Taylor(1).start(base, CONTEXT)(Past(path(3), [(0, path(0)), (3, path(3))]), state(5))
    assert (predicted - path(5)).abs().max() > 1e-2


@pytest.mark.parametrize("order", [1, 2])
def test_taylor_over_evenly_spaced_steps_is_taylorseer(base: MaskGIT, order: int) -> None:
    interval, ahead = 3, 2
    oldest, middle, newest = torch.randn(3, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    full = [(0, oldest), (interval, middle), (2 * interval, newest)][-order - 1 :]
    # divided differences in Newton's form, written out from arXiv 2503.06923
    first = (newest - middle) / interval
    second = (newest - 2 * middle + oldest) / interval**2
    expected = newest + first * ahead
    if order == 2:
        expected = expected + second * ahead * (ahead + interval) / 2
    predicted = Taylor(order).start(base, CONTEXT)(Past(newest, full), state(2 * interval + ahead))
    torch.testing.assert_close(predicted, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("order", [1, 2])
def test_taylor_with_one_full_step_holds(base: MaskGIT, order: int) -> None:
    only = torch.randn(SHAPE)
    assert torch.equal(Taylor(order).start(base, CONTEXT)(Past(torch.zeros(SHAPE), [(0, only)]), state(2)), only)


@pytest.mark.parametrize("order", [1, 2])
def test_plan_remembers_as_many_full_steps_as_taylor_needs(order: int) -> None:
    num_steps, budget = 15, 7
    moving = MovingBase(polynomial(order))
    features_of = Accelerated(Even(budget), Taylor(order)).start(moving, Context(), [1] * num_steps)  # type: ignore[arg-type]
    enough = even_steps(num_steps, budget)[order]
    for index in range(num_steps):
        moving.index = index
        features, is_full = features_of(state(index))
        assert is_full == (index in even_steps(num_steps, budget))
        if index >= enough:
            torch.testing.assert_close(features, moving.path(index), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("memory", [0, 1, 2, 3])
def test_predictor_sees_the_latest_features_and_no_more_full_steps_than_it_remembers(memory: int) -> None:
    class Spy(Hold):
        def start(self, base: BaseEnds, context: Context) -> PredictFn:
            def predict(past: Past, state: State) -> Tensor:
                seen.append((state.clock.step, [index for index, _ in past.full], past.latest))
                return past.latest + 1

            return predict

    seen: list[tuple[int, list[int], Tensor]] = []
    spy, moving, plan = Spy(), MovingBase(polynomial(2)), even_steps(15, 5)
    spy.memory = memory
    features_of = Accelerated(Even(5), spy).start(moving, Context(), [1] * 15)  # type: ignore[arg-type]
    handed_out = []
    for index in range(15):
        moving.index = index
        handed_out.append(features_of(state(index))[0])
    assert [index for index, _, _ in seen] == [index for index in range(15) if index not in plan]
    for index, remembered, latest in seen:
        earlier = [step for step in plan if step < index]
        assert remembered == earlier[len(earlier) - min(memory, len(earlier)) :]
        assert latest is handed_out[index - 1]


@pytest.mark.parametrize("nodes", [*NODES, [0, 1, 5, 6]])
def test_lagrange_weights_equal_scipy(nodes: list[int]) -> None:
    for x in range(12):
        weights = lagrange_weights(nodes, x)
        assert sum(weights) == pytest.approx(1)
        values = torch.randn(len(nodes), dtype=torch.float64, generator=torch.Generator().manual_seed(x)).numpy()
        expected = float(interpolate.BarycentricInterpolator(nodes, values)(x))
        assert sum(w * v for w, v in zip(weights, values, strict=True)) == pytest.approx(expected)


def test_lagrange_weight_of_a_single_node_is_one() -> None:
    assert lagrange_weights([4], 9) == [1]


def test_lagrange_weights_are_one_at_their_node() -> None:
    assert lagrange_weights([0, 3, 7], 3) == [0, 1, 0]


@pytest.mark.parametrize("order", [-1, 0, 3])
def test_other_orders_are_refused(order: int) -> None:
    with pytest.raises(ValueError, match=f"order must be 1 or 2.*got {order}"):
        Taylor(order)
