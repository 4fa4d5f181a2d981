"""Temperature of drawing codes, step by step."""

from __future__ import annotations

from dataclasses import dataclass

from lit_shortcut.bounds import require_above, require_at_least


@dataclass(frozen=True)
class TemperatureCourse:
    """Inverse temperature, a factor of the logits at each step (Halton-MaskGIT, arXiv 2503.17076).

    It runs linearly from ``first`` to ``last``, raised to ``power``; the default is 1 at every step.

    Args:
        first: factor at the first step, before ``power``.
        last: factor at the last step, before ``power``.
        power: exponent of the factor.
        warmup: number of first steps at which the factor is halved.

    Raises:
        ValueError: if a factor is not positive, or ``warmup`` is negative.

    >>> TemperatureCourse(first=1.0, last=2.0, power=2, warmup=1).at(step=0, num_steps=3)
    0.5
    """

    first: float = 1.0
    last: float = 1.0
    power: float = 1.0
    warmup: int = 0

    def __post_init__(self) -> None:
        for name in ("first", "last"):
            require_above(0, **{f"temperature_course.{name}": getattr(self, name)})
        require_at_least(0, **{"temperature_course.warmup": self.warmup})

    def at(self, step: int, num_steps: int) -> float:
        """Return the factor at ``step`` of ``num_steps``."""
        progress = step / max(1, num_steps - 1)
        factor: float = (self.first + (self.last - self.first) * progress) ** self.power
        return factor / 2 if step < self.warmup else factor
