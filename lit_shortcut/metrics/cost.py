"""What a run of the decoding loop costs, put together from its parts. Pure arithmetic, in seconds or in operations."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from torch import nn

from lit_shortcut.metrics.parts import Laps


class StepCosts(NamedTuple):
    """What a step costs, part by part, all in one unit.

    ``full`` is a pass of the base, ``predicted`` of what stands in for it; ``head`` and ``choice`` of tokens are means
    over the steps of a run, since fewer places are left from step to step.
    """

    full: float
    predicted: float
    head: float
    choice: float

    def run(self, num_steps: int, budget: int) -> float:
        """Cost of ``num_steps`` (N), ``budget`` (b) of them full.

        >>> StepCosts(full=10, predicted=1, head=0.5, choice=0.25).run(num_steps=8, budget=2)
        32.0
        """
        ends = num_steps * (self.head + self.choice)
        return budget * self.full + (num_steps - budget) * self.predicted + ends


class Depth(NamedTuple):
    """Layers that were ``built`` of a base, and how many its ``published`` form has, each like every other."""

    built: int
    published: int

    def extrapolate(self, outside: float, inside: float) -> float:
        """Cost at published depth, of which ``outside`` the layers and ``inside`` all that were built is known.

        >>> Depth(built=2, published=32).extrapolate(outside=5.0, inside=6.0)
        101.0
        """
        return outside + inside * self.published / self.built


def masked_places(counts: Sequence[int]) -> list[int]:
    """Places still masked before each of the steps that commit ``counts``.

    >>> masked_places([1, 2, 5])
    [8, 7, 5]
    """
    return list(accumulate(reversed(counts)))[::-1]


def step_costs(laps: Laps, depth: Depth, places: Sequence[int], steps: int) -> StepCosts:
    """Costs at published depth, from ``laps`` of the first ``steps`` of a run in the parts of :mod:`.parts`.

    ``laps`` hold ``base``, without its ``layer``s, and ``predicted``. Head and choice cost the same at each of
    ``places``, those drawn at by each step of the whole run.
    """
    passes = laps.calls["base"]
    share = sum(places) / len(places) / sum(places[:steps])  # of a mean step in the steps that were run
    return StepCosts(
        full=depth.extrapolate(laps.seconds["base"], laps.seconds["layer"]) / passes,
        predicted=laps.seconds["predicted"] / laps.calls["predicted"],
        head=laps.seconds["head"] * share,
        choice=laps.seconds["token choice"] * share,
    )


def num_parameters(module: nn.Module) -> int:
    """Of ``module``, which may lie on the meta device; shared ones count once."""
    return sum(parameter.numel() for parameter in module.parameters())


def num_bytes(module: nn.Module) -> int:
    """Its parameters take, in their own precisions."""
    return sum(parameter.nbytes for parameter in module.parameters())
