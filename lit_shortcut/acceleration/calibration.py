"""Search for plans on recorded trajectories: the best full steps of a budget, and thresholds of a mean budget.

The cost of a plan is the KL of the guided heads at the places each step commits, with the predictor rolled along the
recorded control tokens. The cost of a segment between two full steps does not depend on the rest of the plan, so
dynamic programming finds the best plan, as in LeMiCa (Gao et al., arXiv 2511.00090), which minimises the worst segment.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import accumulate, combinations
from math import exp, log
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_shortcut.acceleration.accelerated import Accelerated, DecideFn, Plan, Predictor
from lit_shortcut.acceleration.plans import at_steps
from lit_shortcut.acceleration.replay import Replay, committed_kl
from lit_shortcut.bounds import require_in_steps

Nodes = tuple[int, ...]
"""The last full steps, oldest first: as many as a predictor's memory, at least one; fewer only at the beginning."""

_THRESHOLDS = (1e-6, 1e6)  # a range far wider than relative changes of features
_ROUNDS = 24  # of bisection on a logarithmic scale
_MOST_HISTORIES = 5000


class Segments(NamedTuple):
    """Cost of each step after the full steps ``nodes``, in nats per image: ``costs[nodes]`` (N,), 0 up to the last."""

    num_steps: int
    memory: int
    costs: dict[Nodes, Tensor]

    @classmethod
    def none(cls, num_steps: int, memory: int, device: torch.device) -> Segments:
        """Return zero costs, to which :meth:`measured` adds.

        Raises:
            ValueError: if there are too many histories to search.
        """
        memory = max(1, memory)
        histories = list(combinations(range(num_steps), memory))
        histories += [(0, *rest) for short in range(memory - 1) for rest in combinations(range(1, num_steps), short)]
        if len(histories) > _MOST_HISTORIES:
            raise ValueError(
                f"a predictor with a memory of {memory} full steps has {len(histories)} histories in {num_steps} "
                f"steps; at most {_MOST_HISTORIES} can be searched"
            )
        return cls(num_steps, memory, {nodes: torch.zeros(num_steps, device=device) for nodes in histories})

    def measured(self, replay: Replay, predictor: Predictor) -> Segments:
        """Add the costs of one recorded batch, summed over its samples."""
        costs = {}
        for nodes, earlier in self.costs.items():
            run = Accelerated(_At(nodes), predictor).start(replay, replay.recorded, replay.counts)
            cost = earlier.clone()
            for state in replay.states(nodes[0]):
                features, _ = run(state)
                step = state.clock.step
                if step > nodes[-1]:
                    truth = replay.features(state.tokens, replay.recorded, state.clock)
                    cost[step] += committed_kl(replay, truth, features, step).sum()
            costs[nodes] = cost
        return self._replace(costs=costs)


class Found(NamedTuple):
    """Full ``steps`` and their cost, ``kl`` in nats per image."""

    steps: list[int]
    kl: float


def best_plan(segments: Segments, budget: int) -> Found:
    """Return the cheapest ``budget`` full steps, by dynamic programming.

    Raises:
        ValueError: if the budget lies outside 1..N.
    """
    num_steps, memory = segments.num_steps, segments.memory
    require_in_steps(num_steps, budget=budget)
    until = _cost_until(segments)

    @cache
    def best(nodes: Nodes, left: int) -> tuple[float, tuple[int, ...]]:
        last = nodes[-1]
        if left == 0:
            return until[nodes][num_steps], ()
        choices = []
        for step in range(last + 1, num_steps - left + 1):
            cost, steps = best((*nodes, step)[-memory:], left - 1)
            choices.append((until[nodes][step] + cost, (step, *steps)))
        return min(choices)

    kl, steps = best((0,), budget - 1)
    return Found([0, *steps], kl)


def cost_of(segments: Segments, steps: Sequence[int]) -> float:
    """Return the cost of the full ``steps`` in nats per image."""
    until, total = _cost_until(segments), 0.0
    for number, end in enumerate([*steps[1:], segments.num_steps], start=1):
        total += until[tuple(steps[:number])[-segments.memory :]][end]
    return total


def threshold_for(mean_full_steps: Callable[[float], float], budget: float) -> tuple[float, float]:
    """Return the threshold whose mean number of full steps is nearest to ``budget``, and that number.

    Args:
        mean_full_steps: returns the mean at a threshold; decreasing.
        budget: the desired mean.
    """
    low, high = (log(end) for end in _THRESHOLDS)
    tried = []
    for _ in range(_ROUNDS):
        middle = (low + high) / 2
        mean = mean_full_steps(exp(middle))
        tried.append((abs(mean - budget), exp(middle), mean))
        if mean == budget:
            break
        low, high = (middle, high) if mean > budget else (low, middle)
    _, threshold, mean = min(tried)
    return threshold, mean


def _cost_until(segments: Segments) -> Mapping[Nodes, list[float]]:
    """Return the cost of the steps after the last of ``nodes`` and before each step, N included."""
    return {nodes: [0.0, *accumulate(cost.tolist())] for nodes, cost in segments.costs.items()}


class _At(Plan):
    """Full at ``nodes``, at whichever step the run begins."""

    def __init__(self, nodes: Nodes) -> None:
        self.nodes = nodes

    def identity(self) -> dict[str, Any]:
        return {"plan": "at", "budget": len(self.nodes), "steps": list(self.nodes)}

    def start(self, counts: Sequence[int], predictor: Predictor) -> DecideFn:
        return at_steps(self.nodes)
