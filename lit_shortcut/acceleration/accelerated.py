"""Vanilla decoding, and the base at planned steps with a predictor in between: a plan says when, a predictor what."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, TypeGuard

from torch import Tensor, nn

from lit_shortcut.contracts import BaseEnds, Context, FeatureFn, FeatureModel, State


class Past(NamedTuple):
    """Earlier features, for plans and predictors.

    ``latest`` (G, B, S, C) are the previous step's features, predicted or not; ``full`` holds index and features of the
    last full steps, oldest first, as many as the predictor's ``memory``.
    """

    latest: Tensor
    full: list[tuple[int, Tensor]]

    @property
    def steps(self) -> list[int]:
        """Return the indices of the last full steps."""
        return [index for index, _ in self.full]

    def combined(self, weights: Sequence[float]) -> Tensor:
        """Return the sum of the last full steps' features times ``weights``."""
        terms = [weight * features for weight, (_, features) in zip(weights, self.full, strict=True)]
        return sum(terms[1:], start=terms[0])


PredictFn = Callable[[Past, State], Tensor]
"""Maps the past and the present state to features (G, B, S, C)."""

DecideFn = Callable[[Past, State], bool | Tensor]
"""Decides whether the base runs at the present step, for the whole batch or sample by sample (B,)."""


class Predictor(Protocol):
    """Computes features in place of the base between full steps."""

    @property
    def memory(self) -> int:
        """Number of past full steps it needs."""

    def identity(self) -> dict[str, Any]:
        """JSON values that determine its features: ``method``, and its weights if it has any."""

    def start(self, base: BaseEnds, context: Context) -> PredictFn:
        """Return a predicting function for one batch of ``base``'s features under ``context``."""


class Plan(ABC):
    """Decides at which steps the base runs; step 0 is always full, without a call.

    A class rather than a protocol, so that YAML can name one and leave its budget to each row.
    """

    reads_features: ClassVar[bool] = False
    """True if decisions depend on features, so that they are unknown before a run."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """JSON values that determine its decisions: ``plan``, its name, and ``budget``, if it has one, among them."""

    def require_base(self, base: BaseEnds) -> None:  # noqa: B027 - most plans know no base
        """Raise ValueError if it was made for another base."""

    @abstractmethod
    def start(self, counts: Sequence[int], predictor: Predictor) -> DecideFn:
        """Return a deciding function for one batch whose N steps commit ``counts`` tokens, ``predictor`` in between.

        Raises:
            ValueError: if the plan does not fit the steps or the predictor.
        """


class Vanilla:
    """The base at every step."""

    def identity(self) -> dict[str, Any]:
        """Name of the method."""
        return {"method": "vanilla"}

    def start(self, base: FeatureModel, context: Context, counts: Sequence[int]) -> FeatureFn:
        """Return the base's own features."""
        return lambda state: (base.features(state.tokens, context, state.clock), True)


class Accelerated(nn.Module):
    """The base at the steps that ``plan`` chooses, ``predictor`` at the others (arXiv 2602.23996).

    It is a module, so that a predictor's network follows the task in device and precision. If a plan decides sample by
    sample, the base runs on the samples that need it; this requires a predictor without memory of full steps.

    Args:
        plan: decides when the base runs.
        predictor: computes the features of the other steps.
    """

    def __init__(self, plan: Plan, predictor: Predictor) -> None:
        super().__init__()
        self.plan, self.predictor = plan, predictor

    def identity(self) -> dict[str, Any]:
        """Identities of predictor and plan together."""
        return self.predictor.identity() | self.plan.identity()

    def start(self, base: FeatureModel, context: Context, counts: Sequence[int]) -> FeatureFn:
        """Return features by plan.

        Raises:
            ValueError: if the plan or the predictor does not fit the base or the steps.
        """
        self.plan.require_base(base)
        decide, predict = self.plan.start(counts, self.predictor), self.predictor.start(base, context)
        memory, full = self.predictor.memory, list[tuple[int, Tensor]]()
        latest: Tensor | None = None

        def features_of(state: State) -> tuple[Tensor, bool | Tensor]:
            nonlocal latest
            past = None if latest is None else Past(latest, full)
            is_full = True if past is None else decide(past, state)
            if past is None or is_full is True:
                latest = base.features(state.tokens, context, state.clock)
                full.append((state.clock.step, latest))
                del full[: max(0, len(full) - memory)]
            else:
                latest = predict(past, state)
                if isinstance(is_full, Tensor):
                    latest = _refreshed(latest, is_full, base, context, state)
            return latest, is_full

        return features_of


def reads_features(method: object) -> TypeGuard[Accelerated]:
    """Return whether features decide which steps of ``method`` are full, so that images may depend on their batch."""
    return isinstance(method, Accelerated) and method.plan.reads_features


def _refreshed(predicted: Tensor, is_full: Tensor, base: FeatureModel, context: Context, state: State) -> Tensor:
    """Return ``predicted`` (G, B, S, C) with the base's features for the samples marked by ``is_full`` (B,)."""
    index = is_full.nonzero()[:, 0]
    if not len(index):
        return predicted
    computed = base.features(state.tokens[index], context.rows(index), state.clock)
    return predicted.index_copy(1, index, computed.to(predicted.dtype))
