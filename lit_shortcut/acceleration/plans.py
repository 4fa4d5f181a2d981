"""When the base runs."""

from __future__ import annotations


def full_steps(num_steps: int, budget: int) -> list[int]:
    """Indices of the ``budget`` steps at which the base runs, spread evenly from step 0 (arXiv 2602.23996, section 4).

    >>> full_steps(num_steps=15, budget=7)
    [0, 2, 4, 6, 9, 11, 13]

    Raises:
        ValueError: if ``budget`` lies outside 1..num_steps.
    """
    if not 1 <= budget <= num_steps:
        raise ValueError(f"budget must lie in 1..{num_steps}, the number of steps; got {budget}")
    steps = [0]
    for k in range(1, budget):
        steps.append(max(steps[-1] + 1, round(num_steps * k / budget)))
    return steps
