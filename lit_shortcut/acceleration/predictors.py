"""Training-free predictors: repetition of the last features, and polynomials through past full steps."""

from __future__ import annotations

from typing import Any

from lit_shortcut.acceleration.accelerated import PredictFn
from lit_shortcut.contracts import BaseEnds, Context


class Hold:
    """Repetition of the previous features."""

    memory = 0

    def identity(self) -> dict[str, Any]:
        """Name of the method."""
        return {"method": "hold"}

    def start(self, base: BaseEnds, context: Context) -> PredictFn:
        """Repeat the latest features."""
        return lambda past, state: past.latest


class Taylor:
    """Extrapolation by the polynomial through the last full steps (TaylorSeer, Liu et al., arXiv 2503.06923).

    At evenly spaced full steps this polynomial equals TaylorSeer's finite differences; here the spacing may vary. Until
    there are ``order`` + 1 full steps the polynomial goes through all of them.

    Args:
        order: degree of the polynomial, 1 or 2.

    Raises:
        ValueError: if ``order`` is neither.
    """

    def __init__(self, order: int) -> None:
        if order not in (1, 2):
            raise ValueError(f"order must be 1 or 2 (order 0 is Hold), got {order}")
        self.order, self.memory = order, order + 1

    def identity(self) -> dict[str, Any]:
        """Name with the order."""
        return {"method": f"taylor {self.order}"}

    def start(self, base: BaseEnds, context: Context) -> PredictFn:
        """Extrapolate to the present step."""
        return lambda past, state: past.combined(lagrange_weights(past.steps, state.clock.step))


def lagrange_weights(nodes: list[int], x: int) -> list[float]:
    """Return the weights, of sum 1, of the values at ``nodes`` in the value at ``x`` of the polynomial through them.

    >>> lagrange_weights([0, 2], 3)
    [-0.5, 1.5]
    """
    weights = []
    for node in nodes:
        weight = 1.0
        for other in nodes:
            if other != node:
                weight *= (x - other) / (node - other)
        weights.append(weight)
    return weights
