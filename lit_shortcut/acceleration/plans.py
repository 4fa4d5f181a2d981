"""Plans: fixed by the number of steps, listed, or decided from the features during a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lit_shortcut.acceleration.accelerated import DecideFn, Past, Plan, Predictor
from lit_shortcut.bounds import require_above, require_at_least, require_in_steps
from lit_shortcut.contracts import State
from lit_shortcut.guidance import guide

Per = Literal["sample", "batch"]


class Steps(Plan):
    """The base at the listed steps.

    Args:
        steps: indices of the full steps, increasing from 0.

    Raises:
        ValueError: if they do not increase from 0.
    """

    def __init__(self, steps: Sequence[int]) -> None:
        self.steps = list(steps)
        if self.steps[:1] != [0] or self.steps != sorted(set(self.steps)):
            raise ValueError(f"steps must increase from 0, the first step; got {self.steps}")

    def identity(self) -> dict[str, Any]:
        """Name, budget and steps."""
        return {"plan": "steps", "budget": len(self.steps), "steps": self.steps}

    def start(self, counts: Sequence[int], predictor: Predictor) -> DecideFn:
        """Decide by list; raises ValueError if a step lies beyond the last."""
        if self.steps[-1] >= len(counts):
            raise ValueError(f"steps must lie in 0..{len(counts) - 1}; got {self.steps}")
        return at_steps(self.steps)


class _Spread(Plan):
    """A plan that spreads ``budget`` full steps."""

    _name: str

    def __init__(self, budget: int) -> None:
        require_at_least(1, budget=budget)
        self.budget = budget

    def identity(self) -> dict[str, Any]:
        """Name and budget."""
        return {"plan": self._name, "budget": self.budget}


class Even(_Spread):
    """The base at ``budget`` steps spread evenly over the steps, as published (arXiv 2602.23996, section 4).

    Args:
        budget: b, number of full steps.

    Raises:
        ValueError: if the budget is below 1.
    """

    _name = "even"

    def start(self, counts: Sequence[int], predictor: Predictor) -> DecideFn:
        """Decide by step index; raises ValueError if the budget lies outside 1..N."""
        return at_steps(even_steps(len(counts), self.budget))


class Early(_Spread):
    """The base at steps that lie closer together the earlier they are: step round(N·(k/b)^power).

    What the first steps commit decides the image, and errors made there are kept; at equal cost this kept more of
    vanilla's images than even steps (``docs/tried.md``). At power 1 it is :class:`Even`.

    Args:
        budget: b, number of full steps.
        power: how much closer, at least 1.

    Raises:
        ValueError: if budget or power is below 1.
    """

    _name = "early"

    def __init__(self, budget: int, power: float = 1.5) -> None:
        super().__init__(budget)
        require_at_least(1, power=power)
        self.power = power

    def identity(self) -> dict[str, Any]:
        """Name, budget and power."""
        return super().identity() | {"power": self.power}

    def start(self, counts: Sequence[int], predictor: Predictor) -> DecideFn:
        """Decide by step index; raises ValueError if the budget lies outside 1..N."""
        return at_steps(early_steps(len(counts), self.budget, self.power))


class Adaptive(Plan):
    """The base when the features have changed by more than ``threshold`` since it last ran.

    The change of a step is |f_t − f_(t−1)| / |f_(t−1)| over the image tokens after guidance, as in EasyCache (Zhou et
    al., arXiv 2507.02860); changes add up until they exceed the threshold. Features of the branches would not do: a
    guided shortcut predicts the guided features for both. With a calibrated threshold the mean number of full
    steps is the budget (:mod:`lit_shortcut.acceleration.calibration`).

    Args:
        threshold: sum of relative changes above which a step is full.
        per: decide for each ``sample``, or for the whole ``batch`` by its mean.
        max_gap: largest number of consecutive steps without the base.
        budget: mean number of full steps that the threshold was calibrated for; only a label.

    Raises:
        ValueError: if the threshold or the gap is not positive, or ``per`` is unknown.
    """

    reads_features = True

    def __init__(
        self,
        threshold: float,
        per: Per = "batch",
        max_gap: int | None = None,
        budget: float | None = None,
    ) -> None:
        require_above(0, threshold=threshold)
        if per not in get_args(Per):
            raise ValueError(f"per must be one of {', '.join(get_args(Per))}; got {per!r}")
        if max_gap is not None:
            require_at_least(1, max_gap=max_gap)
        self.threshold, self.per, self.max_gap, self.budget = threshold, per, max_gap, budget

    def identity(self) -> dict[str, Any]:
        """Name and arguments."""
        named = {} if self.budget is None else {"budget": self.budget}
        return {"plan": "adaptive", "threshold": self.threshold, "per": self.per, "max_gap": self.max_gap} | named

    def start(self, counts: Sequence[int], predictor: Predictor) -> DecideFn:
        """Decide by accumulated change.

        Raises:
            ValueError: if it decides per sample and the predictor has a memory of full steps, which samples share.
        """
        if self.per == "sample" and predictor.memory > 0:
            raise ValueError(
                f"per: sample needs a predictor without memory of full steps, "
                f"{type(predictor).__name__} has memory {predictor.memory}; use per: batch"
            )
        earlier: Tensor | None = None
        change: Tensor | float = 0.0
        gap: Tensor | int = 0

        def decide(past: Past, state: State) -> bool | Tensor:
            nonlocal earlier, change, gap
            if earlier is None:
                moved = torch.zeros(len(state.tokens), device=past.latest.device)
            else:
                image = slice(state.tokens.shape[1])
                moved = relative_change(*(guide(part[:, :, image], state.guidance) for part in (past.latest, earlier)))
            earlier = past.latest
            change = change + (moved if self.per == "sample" else moved.mean())
            gap = gap + 1
            is_full = change > self.threshold
            if self.max_gap is not None:
                is_full = is_full | (gap > self.max_gap)
            if self.per == "batch":
                is_batch_full = bool(is_full)
                change, gap = (0.0, 0) if is_batch_full else (change, gap)
                return is_batch_full
            change = change.where(~is_full, 0.0)
            gap = torch.where(is_full, 0, gap)
            return is_full

        return decide


def relative_change(features: Tensor, earlier: Tensor) -> Tensor:
    """Return |f − f'| / |f'| (B,) of ``features`` and ``earlier`` (B, L, C)."""
    now, before = features.float(), earlier.float()
    moved, size = (part.flatten(1).norm(dim=1) for part in (now - before, before))
    return moved / size.clamp(min=torch.finfo(torch.float32).tiny)


def at_steps(steps: Sequence[int]) -> DecideFn:
    """Decide by membership in ``steps``."""
    full = frozenset(steps)
    return lambda past, state: state.clock.step in full


def even_steps(num_steps: int, budget: int) -> list[int]:
    """Return the indices of ``budget`` full steps spread evenly from step 0 (arXiv 2602.23996, section 4).

    >>> even_steps(num_steps=15, budget=7)
    [0, 2, 4, 6, 9, 11, 13]

    Raises:
        ValueError: if ``budget`` lies outside 1..num_steps.
    """
    return early_steps(num_steps, budget, power=1)


def early_steps(num_steps: int, budget: int, power: float) -> list[int]:
    """Return the indices of ``budget`` full steps, round(N·(k/b)^power), shifted if two would coincide.

    >>> early_steps(num_steps=12, budget=4, power=1.5)
    [0, 2, 4, 8]

    Raises:
        ValueError: if ``budget`` lies outside 1..num_steps.
    """
    require_in_steps(num_steps, budget=budget)
    steps = [0]
    for k in range(1, budget):
        steps.append(max(steps[-1] + 1, round(num_steps * k**power / budget**power)))
    return steps
