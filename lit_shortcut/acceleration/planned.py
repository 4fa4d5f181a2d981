"""Vanilla decoding, and the base at planned steps with a predictor in between."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from torch import Tensor, nn

from lit_shortcut.acceleration.plans import full_steps
from lit_shortcut.contracts import Context, FeatureFn, MaskedImageModel, State


class Past(NamedTuple):
    """What a predictor may look back at.

    ``latest`` (G, B, S, C) are the previous step's features, predicted or not; ``full`` are index and features of the
    last full steps, oldest first, as many as the predictor's ``memory``.
    """

    latest: Tensor
    full: list[tuple[int, Tensor]]


PredictFn = Callable[[Past, State], Tensor]
"""From the past and the present state to features (G, B, S, C)."""


class Predictor(Protocol):
    """Stands in for the base between full steps."""

    @property
    def memory(self) -> int:
        """Full steps it wants to look back at, at least 1."""

    def facts(self) -> dict[str, str | int]:
        """What identifies it in tables and result rows: ``method``, and its weights where it has any."""

    def start(self, base: MaskedImageModel, context: Context) -> PredictFn:
        """A predicting function for one batch of ``base``'s features under ``context``."""


class Vanilla:
    """The base at every step."""

    def facts(self) -> dict[str, str | int]:
        """Its name."""
        return {"method": "vanilla"}

    def start(self, base: MaskedImageModel, context: Context, num_steps: int) -> FeatureFn:
        """Features of the base alone."""
        return lambda state: (base.features(state.tokens, context), True)


class Planned(nn.Module):
    """The base at ``budget`` evenly spread steps, ``predictor`` at the others (arXiv 2602.23996).

    It is a module, so that a predictor's network follows the task that holds it in device and precision.

    Args:
        budget: b, number of full steps, at most the number of steps.
        predictor: computes the features of the other steps.
    """

    def __init__(self, budget: int, predictor: Predictor) -> None:
        super().__init__()
        self.budget, self.predictor = budget, predictor

    def facts(self) -> dict[str, str | int]:
        """The predictor's name and the budget."""
        return self.predictor.facts() | {"budget": self.budget}

    def start(self, base: MaskedImageModel, context: Context, num_steps: int) -> FeatureFn:
        """Features by plan; raises ValueError if the budget lies outside 1..num_steps."""
        plan = set(full_steps(num_steps, self.budget))
        predict = self.predictor.start(base, context)
        full: list[tuple[int, Tensor]] = []
        latest: Tensor | None = None

        def features_of(state: State) -> tuple[Tensor, bool]:
            nonlocal latest
            is_full = state.step in plan
            if is_full or latest is None:  # step 0 is always full
                latest = base.features(state.tokens, context)
                full.append((state.step, latest))
                del full[: -self.predictor.memory]
            else:
                latest = predict(Past(latest, full), state)
            return latest, is_full

        return features_of
