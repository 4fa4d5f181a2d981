"""Numbers that a constructor takes, held against their bounds when it is called and not when they are first used."""

from __future__ import annotations


def require_at_least(least: float, **numbers: float) -> None:
    """Refuse a number below ``least``, or NaN; the message has its name."""
    for name, number in numbers.items():
        if not number >= least:
            raise ValueError(f"{name} must be at least {least}, got {number}")


def require_above(bound: float, **numbers: float) -> None:
    """Refuse a number that is not above ``bound``, or NaN; the message has its name."""
    for name, number in numbers.items():
        if not number > bound:
            raise ValueError(f"{name} must be above {bound}, got {number}")


def require_in_steps(num_steps: int, **numbers: int) -> None:
    """Refuse a number outside 1 … N, such as a budget; the message has its name."""
    for name, number in numbers.items():
        if not 1 <= number <= num_steps:
            raise ValueError(f"{name} must lie in 1..{num_steps}, the number of steps; got {number}")


def require_share(**numbers: float) -> None:
    """Refuse a number outside 0 … 1, or NaN; the message has its name."""
    for name, number in numbers.items():
        if not 0 <= number <= 1:
            raise ValueError(f"{name} must lie in 0..1, got {number}")
