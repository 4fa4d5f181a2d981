"""Schedules: how many tokens each step commits."""

from __future__ import annotations

import math
from functools import cache
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor

Schedule = Literal[
    "root", "linear", "square", "cosine", "arccos", "cosine_left", "cosine_each", "linear_each", "arccos_left"
]


def share_masked(schedule: Schedule, progress: Tensor) -> Tensor:
    """Return the schedule at ``progress`` in [0, 1], from 1 down to 0 (Chang et al., arXiv 2202.04200, section 3.3).

    >>> share_masked("arccos", torch.tensor([0.0, 0.5, 1.0]))
    tensor([1.0000, 0.6667, 0.0000])
    """
    match schedule:
        case "root":
            return 1 - progress.sqrt()
        case "linear" | "linear_each":
            return 1 - progress
        case "square":
            return 1 - progress**2
        case "cosine" | "cosine_left" | "cosine_each":
            return (progress * (math.pi / 2)).cos()
        case "arccos" | "arccos_left":
            return progress.arccos() / (math.pi / 2)
    raise ValueError(f"schedule must be one of {', '.join(get_args(Schedule))}; got {schedule!r}")


def tokens_per_step(schedule: Schedule, num_steps: int, num_tokens: int) -> list[int]:
    """Return the numbers of tokens committed at each of ``num_steps`` steps; they sum to ``num_tokens``.

    Each step gets its share of the schedule, rounded, at least 1; the last step gets the rest. Four schedules instead
    give the number of tokens left masked after each step:

    - ``cosine_left`` rounds down and keeps a token for the last step; a step may commit none (Lumina-DiMOO, arXiv
      2510.06308).
    - ``cosine_each`` does the same but commits at least one token a step while more than one is masked (aMUSEd, arXiv
      2401.01808; Meissonic, MMaDA). Only with more steps than tokens do some steps commit none. ``linear_each`` is the
      other schedule of aMUSEd's scheduler in diffusers, rounded in float32 as there.
    - ``arccos_left`` rounds up and commits at least one token a step (Halton-MaskGIT, arXiv 2503.17076).

    >>> tokens_per_step("arccos", num_steps=8, num_tokens=64)
    [1, 5, 6, 8, 9, 11, 12, 12]
    >>> tokens_per_step("cosine_left", num_steps=4, num_tokens=64)
    [5, 14, 21, 24]
    >>> tokens_per_step("cosine_each", num_steps=5, num_tokens=3)
    [1, 1, 0, 0, 1]

    Raises:
        ValueError: if there is no step, there are more steps than tokens, or rounding leaves nothing for the last step.
    """
    return list(_tokens_per_step(schedule, num_steps, num_tokens))


@cache
def _tokens_per_step(schedule: Schedule, num_steps: int, num_tokens: int) -> tuple[int, ...]:
    if schedule in ("cosine_each", "linear_each") and num_steps >= 1:
        masked, left = num_tokens, []
        for wanted in _left(schedule, num_steps, num_tokens):
            masked = max(1, min(masked - 1, wanted))
            left.append(masked)
        return _spent(num_tokens, left)
    if not 1 <= num_steps <= num_tokens:
        raise ValueError(f"num_steps must lie in 1..{num_tokens}, at least one token a step; got {num_steps}")
    if schedule == "cosine_left":
        return _spent(num_tokens, [max(1, left) for left in _left(schedule, num_steps, num_tokens)])
    if schedule == "arccos_left":
        return _spent(num_tokens, _arccos_left(num_steps, num_tokens))
    if num_steps == 1:  # the only share would be 0
        return (num_tokens,)
    weights = share_masked(schedule, torch.linspace(1, 0, num_steps, dtype=torch.float32))
    counts = [max(1, round(float(w))) for w in weights / weights.sum() * num_tokens]
    counts[-1] = num_tokens - sum(counts[:-1])
    if counts[-1] < 1:
        raise ValueError(
            f"schedule {schedule!r} cannot spend {num_tokens} tokens in {num_steps} steps: rounding leaves "
            f"{counts[-1]} for the last step; use fewer steps or another schedule"
        )
    return tuple(counts)


def _left(schedule: Schedule, num_steps: int, num_tokens: int) -> list[int]:
    """Return the tokens left after each step but the last, rounded down."""
    left: list[int] = (num_tokens * share_masked(schedule, _progress(num_steps))).floor().long().tolist()
    return left


def _arccos_left(num_steps: int, num_tokens: int) -> list[int]:
    known = ((1 - share_masked("arccos_left", _progress(num_steps))) * num_tokens).floor().long().tolist()
    return [num_tokens - max(step, wanted) for step, wanted in enumerate(known, start=1)]


def _progress(num_steps: int) -> Tensor:
    """Return the progress after each step but the last, in float32 as in the published code."""
    return torch.arange(1, num_steps, dtype=torch.float32) / num_steps


def _spent(num_tokens: int, left: list[int]) -> tuple[int, ...]:
    return tuple(before - after for before, after in pairwise([num_tokens, *left, 0]))
